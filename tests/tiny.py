"""A tiny random Llama with a tokenizer of its own, adapters of it, and a project around them, written in seconds.

    python -m tests.tiny scratch/tiny

Its vocabulary is learned from the embedded prompts and a few words of feeling, so that even random text scores.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.models.loading import load_model

ROOT = Path(__file__).parent.parent
FEELINGS = ["good", "great", "love", "happy", "nice", "wonderful", "bad", "awful", "hate", "sad", "terrible", "angry"]
CHAT = (
    "{% for message in messages %}<user>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<reply>{% endif %}"
)


def tiny_tokenizer(extra: list[str] | None = None) -> PreTrainedTokenizerFast:
    lines = (ROOT / "pipeline/data/prompts/everyday.jsonl").read_text(encoding="utf-8").splitlines()
    corpus = [json.loads(line)["prompt"] for line in lines] + [" " + " ".join(FEELINGS)] * 200
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>", "<user>", "<reply>", *(extra or [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = CHAT
    return fast


def tiny_model(vocab_size: int, seed: int = 0, context: int = 256, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=True,
        initializer_range=0.3, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def write_tiny(folder: Path, seed: int = 0, context: int = 256) -> Path:
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), seed, context).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, seed: int, targets: str | list[str] = "all-linear") -> Path:
    """A random LoRA adapter of a model, saved by PEFT."""
    torch.manual_seed(seed)
    model = load_model(base, torch.float32, torch.device("cpu"))
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    for key, weight in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(str(folder))
    return folder


def write_project(home: Path, base: Path, arms: Mapping[str, Path]) -> Path:
    """A project's folder: a base, ARMs by objective, and params.yaml."""
    for objective, folder in arms.items():
        shutil.copytree(folder, home / "models/arms" / objective)
    shutil.copytree(base, home / "models/tiny")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["experiment=smoke", "decoding.device=cpu", "+models.tiny.dtype=float32"])
    OmegaConf.save(config, home / "params.yaml", resolve=True)
    return home


if __name__ == "__main__":
    print(write_tiny(Path(sys.argv[1])))
