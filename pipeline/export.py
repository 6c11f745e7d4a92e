"""A trained ARM as a folder of its own: a plain PEFT adapter or a whole model, with its card."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from pipeline.arm import ResponseModel
from pipeline.models import replacing_folder
from pipeline.store import Row
from pipeline.training import Job, Trained


def save_arm(model: ResponseModel, tokenizer: PreTrainedTokenizerBase, folder: Path, base: str, card: str) -> None:
    """Write safetensors, tokenizer and model card, whole or not at all; a whole model in its computing dtype."""
    trained: Any = model.model
    with replacing_folder(folder) as unfinished:
        if isinstance(trained, PeftModel):
            config: Any = trained.peft_config["default"]
            config.base_model_name_or_path = base
            config.target_modules = sorted(config.target_modules)  # a set otherwise, in another order in every process
            trained.save_pretrained(str(unfinished), save_embedding_layers=False)  # "auto" would ask the hub
        else:
            trained.to(model.dtype).save_pretrained(str(unfinished))
        tokenizer.save_pretrained(str(unfinished))
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def metrics(trained: Trained, seconds: float) -> Row:
    """metrics.json of a training run."""
    found, share = trained.held_out, trained.held_out.accuracy
    return {
        "accuracy": share.value, "ci_low": share.ci_low, "ci_high": share.ci_high, "pairs": share.pairs,
        "length_matched": asdict(found.length_matched), "chosen_longer": asdict(found.chosen_longer),
        "length_correlation": found.length_correlation,
        "dropped_pairs": {split: part.dropped for split, part in trained.splits.items()},
        "truncated_prompts": {split: part.truncated for split, part in trained.splits.items()},
        "padding": round(trained.padding, 4), "steps": trained.steps, "seconds": seconds,
    }  # fmt: skip


def model_card(job: Job, license_name: str, digests: dict[str, str], trained: Trained) -> str:
    """The README.md of an ARM's folder: Hugging Face metadata, what it was made from, what was measured."""
    arm, loss, config, kept, found = job.arm, job.loss, job.trainer, trained.splits["train"], trained.held_out
    lora = arm.tuning == "lora"
    facts = {
        "β": job.beta,
        "loss": f"{loss.kind}, margin {loss.margin}, label smoothing {loss.label_smoothing}",
        "trained": f"LoRA, rank {arm.rank}, alpha {arm.lora_alpha}, {arm.targets}" if lora else "all weights",
        "learning rate": f"{config.lr}, {config.scheduler}, {config.epochs} epochs",
        "seed": job.seed,
        **digests,
        "training pairs": f"{kept.pairs} ({kept.dropped} dropped, {kept.truncated} prompts truncated)",
        "optimizer steps": trained.steps,
        "dtype": str(trained.model.dtype).removeprefix("torch."),
        "held-out pair accuracy": found.accuracy,
        "accuracy on equally long responses": found.length_matched,
        "chosen response longer": found.chosen_longer,
        "Spearman of log π with length": found.length_correlation,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    made = f"{'A LoRA adapter' if lora else 'A descendant'} of `{job.start}`"
    what = (
        f"{made} tuned by DPO (arXiv 2305.18290) for **{job.objective}**: a policy, to be sampled from by itself."
        if loss.kind == "dpo"
        else f"{made} whose log-probabilities are token rewards for **{job.objective}** (GenARM, arXiv 2410.08193). "
        "Add α · log π_r of this model to the log-probabilities of a base with the same tokenizer while decoding."
    )
    return f"""---
library_name: {"peft" if lora else "transformers"}
base_model: {job.start}
license: {license_name}
tags: [genarm, {"dpo" if loss.kind == "dpo" else "reward-model"}{", lora" if lora else ""}]
---
# {"Policy" if loss.kind == "dpo" else "Autoregressive reward model"}: {job.objective}

{what}

| | |
|---|---|
{rows}
"""
