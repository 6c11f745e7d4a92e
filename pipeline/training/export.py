"""What was trained as a folder of its own: a plain PEFT adapter or a whole model, with its card."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from pipeline.data.files import Row, replacing_folder
from pipeline.training.arm import ResponseModel
from pipeline.training.conditioned_arm import ConditionedModel
from pipeline.training.fit import Job, Trained
from pipeline.training.held_out import HeldOut
from pipeline.training.prefix_scorer import PrefixScorer
from pipeline.training.reward_model import RewardModel

_KINDS = {  # what a folder holds: a title, a tag, and what it is for
    "arm": (
        "Autoregressive reward model", "reward-model",
        "whose log-probabilities are token rewards for {aims} (GenARM, arXiv 2410.08193). Add α · log π_r of this "
        "model to the log-probabilities of a base with the same tokenizer while decoding.",
    ),
    "dpo": ("Policy", "dpo", "tuned by DPO (arXiv 2305.18290) for {aims}: a policy, to be sampled from by itself."),
    "parm": (
        "Preference-aware autoregressive reward model", "reward-model",
        "conditioned on the weights of {aims} (PARM, Lin et al. 2025). This is what it is where one of them has all "
        "the weight; `GuidedDecoder` mixes it with those of the others, since at any weights it is their sum by the "
        "weights.",
    ),
    "uniarm": (
        "Unified autoregressive reward model", "reward-model",
        "conditioned on the weights of {aims} (UniARM, arXiv 2602.09538). This is what it is where one of them has all "
        "the weight; `GuidedDecoder` mixes it with those of the others, since at any weights it is their sum by the "
        "weights.",
    ),
    "reward_model": (
        "Reward model", "reward-model",
        "with a scalar head that scores whole texts for {aims} (Bradley–Terry): load it as a sequence classifier with "
        "one label.",
    ),
    "prefix_scorer": (
        "Prefix scorer", "controlled-decoding",
        "which reads the hidden states of the frozen base and scores every next token for {aims} (FUDGE, arXiv "
        "2104.05218): `pipeline.models.prefix_scorer.PrefixValues` reads it.",
    ),
}  # fmt: skip


def save(
    model: ResponseModel, tokenizer: PreTrainedTokenizerBase, folder: Path, base: str, card: str, held_out: HeldOut
) -> None:
    """Write safetensors, tokenizer and model card, whole or not at all; a whole model in its computing dtype.

    An ARM for all mixes is a folder for each of its objectives.
    """
    trained: Any = model.model
    with replacing_folder(folder) as unfinished:
        folders = [unfinished]
        if isinstance(model, RewardModel):
            model.write(unfinished, base, held_out.reward_mean, held_out.reward_std)
        elif isinstance(model, ConditionedModel):
            folders = model.write(unfinished, base)
        elif isinstance(model, PrefixScorer):
            model.write(unfinished, base)
        elif isinstance(trained, PeftModel):
            config: Any = trained.peft_config["default"]
            config.base_model_name_or_path = base
            config.target_modules = sorted(config.target_modules)  # a set otherwise, in another order in every process
            trained.save_pretrained(str(unfinished), save_embedding_layers=False)  # "auto" would ask the hub
        else:
            trained.to(model.dtype).save_pretrained(str(unfinished))
        for each in folders:
            tokenizer.save_pretrained(str(each))
            (each / "README.md").write_text(card, encoding="utf-8")


def metrics(held_out: HeldOut, trained: Trained | None = None, epochs: int = 0) -> Row:
    """metrics.json of an ARM; tokens are those that its training computed, prompts included, each time.

    Without a training run, of an ARM that came from elsewhere, what training counts is 0. Of an ARM for all mixes
    `objectives` holds what it does where each of them has all the weight.
    """
    splits = {} if trained is None else trained.splits
    ends = {} if trained is None else trained.ends
    return {
        **_measured(held_out),
        "dropped_pairs": {split: part.dropped for split, part in splits.items()},
        "truncated_prompts": {split: part.truncated for split, part in splits.items()},
        "tokens": epochs * sum(len(group) for group in splits["train"].groups) if splits else 0,
        "padding": round(trained.padding, 4) if trained else 0.0,
        "steps": trained.steps if trained else 0,
        **({"objectives": {name: _measured(end) for name, end in ends.items()}} if ends else {}),
    }


def _measured(held_out: HeldOut) -> Row:
    share = held_out.accuracy
    return {
        "accuracy": share.value, "ci_low": share.ci_low, "ci_high": share.ci_high, "pairs": share.pairs,
        "prompts": share.prompts,
        "length_matched": asdict(held_out.length_matched), "chosen_longer": asdict(held_out.chosen_longer),
        "length_correlation": held_out.length_correlation,
    }  # fmt: skip


def model_card(job: Job, license_name: str, digests: dict[str, str], trained: Trained) -> str:
    """The README.md of an ARM's folder: Hugging Face metadata, what it was made from, what was measured."""
    arm, loss, config, kept, measured = job.arm, job.loss, job.trainer, trained.splits["train"], trained.held_out
    lora = arm.tuning == "lora" and job.kind != "prefix_scorer"
    if lora:
        made, what_learned = "A LoRA adapter", f"LoRA, rank {arm.rank}, alpha {arm.lora_alpha}, {arm.targets}"
    elif job.kind == "prefix_scorer":
        made, what_learned = "A head", "a head on the frozen base"
    else:
        made, what_learned = "A descendant", "all weights"
    facts = {
        "β": ", ".join(f"{beta:g} ({name})" for name, (beta, _) in job.terms.items()),
        "pairs count": ", ".join(f"{weight:g} ({name})" for name, (_, weight) in job.terms.items()),
        "loss": f"{loss.kind}, margin {loss.margin}, label smoothing {loss.label_smoothing}",
        "trained": what_learned,
        "learning rate": f"{config.lr}, {config.scheduler}, {config.epochs} epochs",
        "seed": job.seed,
        **digests,
        "training pairs": f"{kept.pairs} ({kept.dropped} dropped, {kept.truncated} prompts truncated)",
        "optimizer steps": trained.steps,
        "dtype": str(trained.model.dtype).removeprefix("torch."),
        "held-out pair accuracy": measured.accuracy,
        "accuracy on equally long responses": measured.length_matched,
        "chosen response longer": measured.chosen_longer,
        "Spearman of log π with length": measured.length_correlation,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    aims = " and ".join(f"**{name}**" for name in job.terms)
    title, tag, what = _KINDS[job.kind]
    return f"""---
library_name: {"peft" if lora else "transformers"}
base_model: {job.start}
license: {license_name}
tags: [genarm, {tag}{", lora" if lora else ""}]
---
# {title}: {job.name}

{made} of `{job.start}` {what.format(aims=aims)}

| | |
|---|---|
{rows}
"""
