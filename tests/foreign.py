"""A base with another tokenizer than `tiny`, and the law of guidance across tokenizers once more, by its definition."""

import json
from functools import cached_property, lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.reference import log_softmax
from tests.tiny import tiny_model

WORDS = ["good", "great", "rain", "rainy", "the", "there", "happy", "sad", "cat", "and", "a", "on", "walk"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """Byte-pair encoding with byte fallback and blanks as ▁, as Llama and Gemma have it; its merges are some words'."""
    vocab = {"<pad>": 0, "<end>": 1, "<unk>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges: list[list[str]] = []

    def add(piece: str) -> None:
        vocab.setdefault(piece, len(vocab))

    for letter in "▁abcdefghijklmnopqrstuvwxyz.,?!":
        add(letter)
    for word in [f"▁{word}" for word in WORDS] + WORDS:
        whole = word[0]
        for letter in word[1:]:
            if [whole, letter] not in merges:
                merges.append([whole, letter])
            whole += letter
            add(whole)
    told = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None, "pre_tokenizer": None,
        "added_tokens": [
            {"id": place, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for place, name in enumerate(("<pad>", "<end>", "<unk>"))
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocab, "merges": merges},
    }  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(told))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}q {{ message['content'] }} a{% endfor %}"
    return fast


def foreign_model(vocab_size: int) -> LlamaForCausalLM:
    return tiny_model(vocab_size, seed=3).eval()


class Slow:
    """The law of one row: no cache, no batch, every text read anew, sums over the whole vocabulary.

    Args:
        base, arms, reference: models.
        prompter, arm_prompter: how base and ARMs are asked.
        interpreter: only its tokens' bytes and their spelling are taken.
    """

    def __init__(self, base, arms, reference, prompter, arm_prompter, interpreter):
        self.base, self.arms, self.reference = base, arms, reference
        self.prompter, self.arm_prompter, self.interpreter = prompter, arm_prompter, interpreter
        self.seen = {}
        pieces = interpreter.arm.pieces
        self.covers = lru_cache(None)(
            lambda text: [one for one, cover in enumerate(pieces) if cover and cover.startswith(text)]
        )
        self.belonging = lru_cache(None)(self._belonging)

    @torch.no_grad()
    def logps(self, model, prompter, prompt, tokens):
        key = id(model), prompt, tuple(tokens)
        if key not in self.seen:
            ids = torch.tensor([[*prompter.prompt_ids(prompt), *tokens]])
            self.seen[key] = log_softmax(model(ids).logits[0, -1, : prompter.vocab_size].double().numpy())
        return self.seen[key]

    def open_after(self, tokens):
        """(settled, tail, the base's tokens of the tail) of the ARM behind the base's tokens."""
        base, arm, table = self.interpreter.base, self.interpreter.arm, self.interpreter.table
        settled, tail, written = [], [], []
        for token in tokens:
            same, text = table.same[token], base.joined((*written, token))
            alone = [same] if same >= 0 else list(arm.spell(base.pieces[token]))
            path = list(arm.spell(text)) if tail and base.spell(text) == (*written, token) else [*tail, *alone]
            if same >= 0 and path == [*tail, same]:
                closing = self.belonging(token) in ([same], [])
                settled += path if closing else tail
                tail, written = ([], []) if closing else ([same], [token])
            else:
                tail, written = path, [*written, token]
        return settled, tail, written

    @cached_property
    def owners(self):
        """The base's token that each of the ARM's belongs to, None without."""
        base, arm, same = self.interpreter.base, self.interpreter.arm, self.interpreter.table.same
        begun = {arm.spell(piece)[0] for piece, one in zip(base.pieces, same, strict=True) if piece and one < 0}
        found = []
        for candidate, piece in enumerate(arm.pieces):
            if candidate in same:
                twins = [place for place, one in enumerate(same) if one == candidate]
                written = [
                    place for place in twins if base.pieces[place] and base.spell(base.pieces[place]) == (place,)
                ]
                found.append((written or twins)[-1])
            else:
                found.append(base.spell(piece)[0] if piece and candidate not in begun else None)
        return found

    def _belonging(self, token):
        """The ARM's tokens that belong to one of the base: of several of the same bytes, to the one that it writes."""
        same = self.interpreter.table.same[token]
        owner = self.owners[same] if same >= 0 else token
        return [candidate for candidate, one in enumerate(self.owners) if one == owner]

    def said(self, model, prompt, tokens):
        """log P(next token of the base) by one model of the ARM's kind, for every token of the base."""
        base, arm, table = self.interpreter.base, self.interpreter.arm, self.interpreter.table
        settled, tail, written = self.open_after(tokens)

        def law(more):
            return self.logps(model, self.arm_prompter, prompt, [*settled, *more])

        def total(path):
            return sum(law(path[:place])[token] for place, token in enumerate(path))

        found = np.full(len(table.same), -np.inf)
        pending = base.joined(tuple(written))
        for token, same in enumerate(table.same):
            piece = base.pieces[token]
            if piece is None:
                found[token] = total([*tail, same]) if same >= 0 else -np.inf
                continue
            text = pending + piece
            if same >= 0 and (not tail or base.spell(text) != (*written, token)
                              or list(arm.spell(text)) == [*tail, same]):  # fmt: skip
                group = self.belonging(token) or [same]
                found[token] = total(tail) + np.log(sum(np.exp(law(tail)[one]) for one in group))
                continue
            departs = tail and base.spell(text) != (*written, token)
            path = [*tail, *arm.spell(piece)] if departs else list(arm.spell(text))
            mass, left = 0.0, text
            for place, step in enumerate(path):
                covers = self.belonging(token) if place == 0 and not tail else self.covers(left)
                mass += sum(np.exp(total([*path[:place], one])) for one in covers)
                left = left[len(arm.pieces[step]) :]
            found[token] = np.log(mass)
        return found

    def law(self, prompt, weights, tokens):
        """The guided law in the log-ratio form."""
        of_reference = self.said(self.reference, prompt, tokens)
        total = self.logps(self.base, self.prompter, prompt, tokens).copy()
        for name, alpha in weights.items():
            with np.errstate(invalid="ignore"):
                ratio = self.said(self.arms[name], prompt, tokens) - of_reference
            total += alpha * np.nan_to_num(ratio, nan=0.0)
        silent = [token for token, same in enumerate(self.interpreter.table.same) if same < 0
                  and not self.interpreter.base.pieces[token]]  # fmt: skip
        total[silent] = -np.inf
        return log_softmax(total)
