"""A tiny random Llama with a tokenizer of its own, written to a folder in a second.

    python -m tests.tiny scratch/tiny

Its vocabulary is learned from the embedded prompts and a few words of feeling, so that even random text scores.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


if __name__ == "__main__":
    print(write_tiny(Path(sys.argv[1])))
