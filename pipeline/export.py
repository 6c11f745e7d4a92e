"""A trained ARM as a folder of its own: a plain PEFT adapter or a whole model, with its card."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from pipeline.arm import ResponseModel
from pipeline.config import Params
from pipeline.models import replacing_folder


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


def model_card(params: Params, objective: str, measured: dict[str, str]) -> str:
    """The README.md of an ARM's folder: Hugging Face metadata, what it was made from, what was measured."""
    base, arm, loss, config = params.base, params.arm, params.loss, params.trainer
    lora = arm.tuning == "lora"
    facts = {
        "β_r": params.objectives[objective].beta,
        "loss": f"{loss.kind}, margin {loss.margin}, label smoothing {loss.label_smoothing}",
        "trained": f"LoRA, rank {arm.rank}, alpha {arm.lora_alpha}, {arm.targets}" if lora else "all weights",
        "learning rate": f"{config.lr}, {config.scheduler}, {config.epochs} epochs",
        "seed": params.seed,
        **measured,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: {"peft" if lora else "transformers"}
base_model: {base.name}
license: {base.license}
tags: [genarm, reward-model{", lora" if lora else ""}]
---
# Autoregressive reward model: {objective}

{"A LoRA adapter" if lora else "A descendant"} of `{base.name}` whose log-probabilities are token rewards for
**{objective}** (GenARM, arXiv 2410.08193). Add α · log π_r of this model to the log-probabilities of a base with the
same tokenizer while decoding.

| | |
|---|---|
{rows}
"""
