"""One training run of an ARM: loaders, checkpoints, resuming, held-out accuracy, the adapter and its card."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from peft import PeftModel
from scipy.stats import binomtest
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.arm import ARM, pair_logps
from pipeline.config import Params, Trainer
from pipeline.models import replacing_folder
from pipeline.pairs import EpochBatches, PromptGroup, ResumableLoader, collate


def train_loader(groups: Sequence[PromptGroup], batch_size: int, seed: int, pad: int) -> ResumableLoader:
    """Shuffled batches of prompts with their pairs, resumable in the middle of an epoch."""
    batches = EpochBatches(len(groups), batch_size, seed)
    return ResumableLoader(
        cast(Dataset[PromptGroup], groups), batch_sampler=batches, collate_fn=partial(collate, pad=pad)
    )


def optimizer_steps(loader: ResumableLoader, config: Trainer) -> int:
    """Optimizer steps of the whole run."""
    return config.epochs * math.ceil(len(loader) / config.accumulate)


def eval_loader(groups: Sequence[PromptGroup], batch_size: int, pad: int) -> DataLoader[Any]:
    """Held-out prompts with their pairs, neighbours of like length, for little padding."""
    ordered = sorted(groups, key=lambda group: sum(map(len, group.responses)))
    return DataLoader(cast(Dataset[PromptGroup], ordered), batch_size=batch_size, collate_fn=partial(collate, pad=pad))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest readable `step=*.ckpt`; an unreadable one (killed while writing) is passed over with a warning."""
    for path in sorted(folder.glob("step=*.ckpt"), reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            warnings.warn(f"{path} is unreadable ({error}): going back to the checkpoint before it.", stacklevel=2)
        else:
            return path
    return None


def fit(
    module: ARM,
    train: ResumableLoader,
    validation: DataLoader[Any],
    config: Trainer,
    checkpoints: Path,
    logger: Logger | bool,
) -> L.Trainer:
    """Train from the newest checkpoint in `checkpoints`, or from the start; the module ends with its best weights.

    The best step is the one with the lowest loss on validation pairs.

    Raises:
        UserError: a loss or gradient is not finite.
    """
    newest = partial(ModelCheckpoint, dirpath=checkpoints, auto_insert_metric_name=False)
    rolling = newest(
        filename="step={step:06d}", monitor="step", mode="max", save_top_k=2,
        every_n_train_steps=config.checkpoint_every, save_on_train_epoch_end=False,
    )  # fmt: skip
    best = newest(
        filename="best-step={step:06d}", monitor="eval/loss", mode="min", save_top_k=1, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator=config.accelerator,
        devices=1,
        max_epochs=config.epochs,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.gradient_clip,
        val_check_interval=1.0 / config.evaluations_per_epoch,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=[rolling, best],
        logger=logger,
        default_root_dir=checkpoints,
        enable_model_summary=False,
    )
    resume = newest_checkpoint(checkpoints)
    if resume is not None:
        print(f"train: going on from {resume}")
    trainer.fit(module, train, validation, ckpt_path=resume, weights_only=True)
    if best.best_model_path:
        state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(state, strict=False)
    return trainer


@dataclass(frozen=True)
class Accuracy:
    """The share of held-out pairs in which the ARM prefers the chosen response, with its Wilson score interval."""

    accuracy: float
    ci_low: float
    ci_high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} (Wilson {self.ci_low:.3f} to {self.ci_high:.3f}, {self.pairs} pairs)"


@torch.no_grad()
def held_out_accuracy(module: ARM, loader: DataLoader[Any], device: torch.device, confidence: float) -> Accuracy:
    """How often log π_r(chosen) exceeds log π_r(rejected)."""
    module.to(device).eval()
    right, pairs = 0, 0
    for batch in loader:
        chosen_B, rejected_B = pair_logps(module.model, {key: value.to(device) for key, value in batch.items()})
        right, pairs = right + int((chosen_B > rejected_B).sum()), pairs + len(chosen_B)
    interval = binomtest(right, pairs).proportion_ci(confidence, method="wilson")
    return Accuracy(right / pairs, float(interval.low), float(interval.high), pairs)


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, base: str, card: str) -> None:
    """Write a plain PEFT folder (safetensors, tokenizer, model card), whole or not at all."""
    with replacing_folder(folder) as unfinished:
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(str(unfinished), save_embedding_layers=False)  # "auto" would ask the hub for the base
        tokenizer.save_pretrained(str(unfinished))
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def model_card(params: Params, objective: str, measured: dict[str, str]) -> str:
    """The README.md of an adapter folder: Hugging Face metadata, what it was made from, what was measured."""
    base, arm, config = params.base, params.arm, params.trainer
    facts = {
        "β_r": params.objectives[objective].beta,
        "LoRA": f"rank {arm.rank}, alpha {arm.lora_alpha}, {arm.targets}",
        "learning rate": f"{config.lr}, {config.scheduler}, {config.epochs} epochs",
        "seed": params.seed,
        **measured,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: peft
base_model: {base.name}
license: {base.license}
tags: [genarm, reward-model, lora]
---
# Autoregressive reward model: {objective}

A LoRA adapter of `{base.name}` whose log-probabilities are token rewards for **{objective}** (GenARM, arXiv
2410.08193). Add α · log π_r of this model to the log-probabilities of a base with the same tokenizer while decoding.

| | |
|---|---|
{rows}
"""
