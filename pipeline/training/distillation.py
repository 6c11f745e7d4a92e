"""Smaller models: some layers of a larger one, trained by distilling it on text that it wrote itself.

Shapes: N response tokens, D features.
"""

import copy
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, get_scheduler

from pipeline.config.errors import UserError
from pipeline.config.schema import Distillation, Model
from pipeline.config.workspace import Workspace
from pipeline.data.files import digest, replacing_folder
from pipeline.data.responses import Response
from pipeline.models.fetch import write_origin
from pipeline.models.loading import Source, load_model, model_digest, resolve_dtype
from pipeline.models.prompting import Prompter
from pipeline.training.arm import ResponseModel
from pipeline.training.attention import RECOMPUTED
from pipeline.training.batches import PromptGroup, ResumableLoader, StepBatches, collate
from pipeline.training.checkpoints import RollingCheckpoint, newest_checkpoint
from pipeline.training.losses import all_finite, distillation

_GROUP = 8  # responses that share one prompt's row
_EVALUATIONS = 8  # of a run
HELD_OUT_SAMPLES = 2  # responses per prompt that is not learned from


def pruned(parent: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of some of the parent's layers, in their order, with its embeddings, head and final norm.

    Raises:
        UserError: the layers are not ascending layers of the parent.
    """
    depth = int(parent.config.num_hidden_layers)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise UserError(f"distillation.layers {list(layers)}: name layers from 0 to {depth - 1}, ascending, each once.")
    config = copy.deepcopy(parent.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    child = AutoModelForCausalLM.from_config(config, dtype=parent.dtype, trust_remote_code=False)
    place = {f".layers.{old}.": f".layers.{new}." for new, old in enumerate(layers)}
    kept = {}
    for name, weight in parent.state_dict().items():
        inside = next((old for old in place if old in name), None)
        if inside is not None:
            kept[name.replace(inside, place[inside], 1)] = weight
        elif ".layers." not in name:
            kept[name] = weight
    child.load_state_dict(kept)
    frozen: PreTrainedModel = child.to(parent.device).eval()
    return frozen


class Distiller(L.LightningModule):
    """Trains the layers of a child towards its parent's next-token law, KL(π_parent ‖ π_child) per response token.

    Both share embeddings and head, which stay as they are: the smaller one has the vocabulary of its parent.
    """

    def __init__(self, child: ResponseModel, parent: ResponseModel, config: Distillation, steps: int) -> None:
        super().__init__()
        self.child, self._config, self._steps = child, config, steps
        self._parent = [parent]  # in a list, so that it is no part of the module
        self.strict_loading = False
        self.history: list[dict[str, Any]] = []

    def on_train_start(self) -> None:
        """Dropout, where a model has any, is on while training only."""
        self.child.train()

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """kl_N to the parent, and the child's token_logps_N."""
        parent = self._parent[0]
        with torch.no_grad():
            target_ND = parent.hidden(batch)
        head = parent.causal.get_output_embeddings()
        return distillation(self.child.hidden(batch), target_ND, head.weight, batch["label"], head.bias)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean KL over the step's response tokens.

        Raises:
            UserError: it is not finite; the last checkpoint is kept.
        """
        loss = self._losses(batch)[0].mean()
        if not all_finite([loss]):
            raise UserError(
                f"distillation: the loss is {loss.item()} at step {self.global_step}: lower distillation.lr."
            )
        self._record("train", {"kl": float(loss.detach())})
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=1)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """KL and negative log-likelihood of held-out text."""
        kl_N, logps_N = self._losses(batch)
        self.log_dict({"eval/kl": kl_N.mean(), "eval/nll": -logps_N.mean()}, batch_size=len(kl_N), logger=False)

    def on_validation_epoch_end(self) -> None:
        """Keep the curve; Lightning has averaged over the tokens."""
        metrics = self.trainer.callback_metrics
        self._record("eval", {"kl": float(metrics["eval/kl"]), "perplexity": math.exp(metrics["eval/nll"])})

    def _record(self, phase: str, values: dict[str, float]) -> None:
        row = {name: round(value, 4) for name, value in values.items()}
        self.history.append({"step": self.global_step, "phase": phase, **row})

    def configure_optimizers(self) -> Any:
        """AdamW on the layers, warm-up then cosine."""
        learning = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=self._config.lr, weight_decay=0.01, betas=(0.9, 0.95))
        schedule = get_scheduler(
            "cosine", optimizer, num_warmup_steps=min(20, self._steps // 4), num_training_steps=self._steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained and the curve."""
        learning = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in learning}
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the curve up again."""
        self.history = list(checkpoint["history"])


def text_groups(responses: Sequence[Response], samples: int, prompter: Prompter) -> list[PromptGroup]:
    """Responses as groups of at most `_GROUP` responses to a prompt; `samples` in turn are of one prompt."""
    groups = []
    for start in range(0, len(responses), samples):
        texts = [
            prompter.response_ids(one.prompt, one.response, one.ended)
            for one in responses[start : start + samples]
            if one.response
        ]
        prompt = prompter.prompt_ids(responses[start].prompt)
        groups += [PromptGroup(prompt, texts[at : at + _GROUP], []) for at in range(0, len(texts), _GROUP)]
    return groups


def distill(
    source: Source, device: torch.device, train: Sequence[PromptGroup], held_out: Sequence[PromptGroup],
    config: Distillation, name: str, spec: Model, workspace: Workspace,
) -> dict[str, float]:  # fmt: skip
    """Write the distilled model of that name to its folder; return its measures on held-out text.

    Raises:
        UserError: the layers are not the parent's, or the loss is not finite.
    """
    prompter, dtype = source.prompter(), resolve_dtype(source.dtype, device)
    parent = load_model(source.folder, dtype, device)
    identity = digest([model_digest(source.folder), str(dtype), asdict(config)])
    checkpoints = workspace.scratch / "distillation" / f"{name}-{identity}"
    child, history = train_child(parent, train, held_out, config, dtype, prompter.eos, checkpoints)
    child.to(parent.device, dtype)  # type: ignore[arg-type]  # Lightning leaves it on the CPU
    measured = compare(parent, child, held_out, config.batch_size, prompter.eos)
    with replacing_folder(workspace.model(name)) as partial:
        child.save_pretrained(partial)
        prompter.tokenizer.save_pretrained(partial)
        pd.DataFrame(history).to_csv(partial / "curve.csv", index=False)
        write_origin(name, spec, partial, layers=list(config.layers))
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {**measured, "steps": history[-1]["step"], "tokens": sum(len(r) for group in train for r in group.responses)}


@torch.no_grad()
def compare(
    parent: PreTrainedModel, child: PreTrainedModel, groups: Sequence[PromptGroup], batch_size: int, pad: int
) -> dict[str, float]:
    """Perplexity of the parent's own held-out text under both, and KL(π_parent ‖ π_child) in nats per token."""
    sums, head = torch.zeros(3, dtype=torch.float64), parent.get_output_embeddings()
    tokens = 0
    for start in range(0, len(groups), batch_size):
        batch = collate(groups[start : start + batch_size], pad)
        batch = {key: value.to(parent.device) for key, value in batch.items()}
        target_ND, own_ND = (ResponseModel(model, model.dtype).hidden(batch) for model in (parent, child))
        kl_N, logps_N = distillation(own_ND, target_ND, head.weight, batch["label"], head.bias)
        _, target_N = distillation(target_ND, target_ND, head.weight, batch["label"], head.bias)
        sums += torch.stack([kl_N.sum(), logps_N.sum(), target_N.sum()]).double().cpu()
        tokens += len(kl_N)
    kl, logp, target = (sums / tokens).tolist()
    measures = {"kl": kl, "perplexity": math.exp(-logp), "parent_perplexity": math.exp(-target)}
    return {name: round(value, 4) for name, value in measures.items()}


def train_child(
    parent: PreTrainedModel,
    train: Sequence[PromptGroup],
    held_out: Sequence[PromptGroup],
    config: Distillation,
    dtype: torch.dtype,
    pad: int,
    checkpoints: Path,
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """The parent cut to `config.layers` and trained, in float32, and its curve; a killed run goes on.

    Args:
        parent: the whole model, frozen, in the dtype to compute in.
        train, held_out: prompts with text that the parent wrote.
        config: layers and training.
        dtype: to compute in.
        pad: the padding token.
        checkpoints: scratch folder of this run alone.

    Raises:
        UserError: the layers are not the parent's, or the loss is not finite.
    """
    device = parent.device
    child = pruned(parent, config.layers).float().requires_grad_(True)
    for shared in (child.get_input_embeddings(), child.get_output_embeddings()):
        shared.requires_grad_(False)
    if device.type == "cpu":
        for model in (parent, child):
            model.set_attn_implementation(RECOMPUTED)
    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    module = Distiller(ResponseModel(child, dtype), ResponseModel(parent, dtype), config, steps)
    validation: DataLoader[Any] = DataLoader(
        cast(Dataset[PromptGroup], sorted(held_out, key=len)), batch_size=config.batch_size,
        collate_fn=partial(collate, pad=pad),
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator=device.type,
        devices=1,
        max_epochs=config.epochs,
        val_check_interval=max(1, steps // _EVALUATIONS),
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[RollingCheckpoint(checkpoints, 20)],
        enable_checkpointing=True,
        default_root_dir=checkpoints,
        enable_model_summary=False,
    )
    resume = newest_checkpoint(checkpoints)
    if resume is not None:
        print(f"distillation: going on from {resume}")
    loader = ResumableLoader(train, StepBatches(train, config.batch_size, config.seed), pad)
    trainer.fit(module, loader, validation, ckpt_path=resume, weights_only=True)
    return child.eval(), module.history
