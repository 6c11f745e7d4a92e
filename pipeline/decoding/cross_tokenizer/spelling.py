"""The tokens of a tokenizer as the bytes they spell, and the spelling of bytes as its tokens."""

import json
from bisect import bisect_left
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config.errors import UserError

_ROOM = 1 << 16  # texts whose spelling is remembered
_PROBES = ("fi ﬁ", "Été e\u0301", "  two\n\n\tİ", "ＡＢＣ ½ ™")  # texts that normalisers are known to change


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as (GPT-2's table): printable ones as they are, others beyond."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    remaining = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(remaining)}


class Spelling:
    """What each token of a tokenizer spells.

    Args:
        tokenizer: byte-level BPE (GPT-2 and its kin), or SentencePiece's with byte fallback (Llama, Gemma).
        name: whose it is, for the errors.

    Raises:
        UserError: its bytes cannot be recovered: not a fast tokenizer, of another kind, with an unknown token, or with
            a normaliser that changes the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(f"{name}: its tokenizer tells no bytes (it has no tokenizer.json): use a fast tokenizer.")
        config = json.loads(backend.to_str())
        decoders = _kinds(config["decoder"])
        self._byte_level = "ByteLevel" in decoders
        if not self._byte_level and not (config["model"].get("byte_fallback") and "ByteFallback" in decoders):
            raise UserError(
                f"{name}: its tokenizer ({config['model']['type']}) has an unknown token, so texts cannot be recovered "
                "from its tokens, and guidance across tokenizers needs that: use a model with byte-level or "
                "byte-fallback BPE."
            )
        self.names = [str(name) for name in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
        added = {entry["id"]: entry for entry in config["added_tokens"]}
        special = {place for place, entry in added.items() if entry["special"]} | set(tokenizer.all_special_ids)
        self._characters = _byte_characters()
        self.pieces: list[bytes | None] = [  # of each token; None: it is no text
            None if token in special else piece.encode() if token in added else self._bytes_of(piece)
            for token, piece in enumerate(self.names)
        ]
        self._inside = Tokenizer.from_str(json.dumps(_without_beginnings(config)))
        self.spell = lru_cache(maxsize=_ROOM)(self._spell)
        self.branches = lru_cache(maxsize=_ROOM)(self._branches)
        for probe in _PROBES:
            read = self.joined(self.spell(probe.encode()))
            if read != probe.encode():
                raise UserError(
                    f"{name}: its tokenizer normalises texts ({probe!r} becomes {read.decode(errors='replace')!r}), so "
                    "what it reads is not what was written: use a model whose tokenizer keeps texts as they are."
                )

    def _bytes_of(self, piece: str) -> bytes:
        if self._byte_level:
            return bytes(self._characters[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def joined(self, tokens: tuple[int, ...]) -> bytes:
        """The text of tokens; special ones add nothing."""
        return b"".join(self.pieces[token] or b"" for token in tokens)

    def _spell(self, text: bytes) -> tuple[int, ...]:
        """`spell`: the canonical tokens of a text inside another; what is no whole character, byte by byte."""
        tokens: list[int] = []
        for broken, characters in groupby(
            text.decode(errors="surrogateescape"), lambda one: "\udc80" <= one <= "\udcff"
        ):
            part = "".join(characters)
            if broken:
                tokens += self._bytewise(part.encode(errors="surrogateescape"))
            else:
                tokens += self._inside.encode(part, add_special_tokens=False).ids
        return tuple(tokens)

    def _bytewise(self, text: bytes) -> tuple[int, ...]:
        """A token a byte; those that no token spells (they occur in no UTF-8, or hardly) are passed over."""
        return tuple(self._single[byte] for byte in text if byte in self._single)

    @cached_property
    def _single(self) -> dict[int, int]:
        """The token of every byte."""
        return {piece[0]: token for token, piece in enumerate(self.pieces) if piece and len(piece) == 1}

    @cached_property
    def _sorted(self) -> tuple[list[bytes], Tensor]:
        """Pieces in the order of their bytes, and their tokens."""
        by_spelling = sorted((piece, token) for token, piece in enumerate(self.pieces) if piece)
        return [piece for piece, _ in by_spelling], torch.tensor([token for _, token in by_spelling])

    def covering(self, text: bytes) -> Tensor:
        """The tokens whose bytes begin with a text (not empty), that text itself included: tokens_K."""
        pieces, order = self._sorted
        return order[bisect_left(pieces, text) : bisect_left(pieces, text + b"\xff" * 8)]

    def _branches(self, text: bytes) -> tuple[Tensor, Tensor]:
        """`branches`: the tokens whose bytes go on behind a text, and the next byte of each: tokens_K, bytes_K."""
        longer = [(token, self.pieces[token] or b"") for token in self.covering(text).tolist()]
        longer = [(token, piece) for token, piece in longer if len(piece) > len(text)]
        return torch.tensor([token for token, _ in longer]), torch.tensor([piece[len(text)] for _, piece in longer])


def _kinds(node: Any) -> set[str]:
    """The types of a component of tokenizer.json and of its parts."""
    if not isinstance(node, dict):
        return set()
    parts = [part for key in ("decoders", "normalizers", "pretokenizers") for part in node.get(key, [])]
    return {node["type"], *(kind for part in parts for kind in _kinds(part))}


def _without_beginnings(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer that takes a text for the middle of one: no mark of a beginning, no special tokens."""

    def cleaned(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        for key in ("normalizers", "pretokenizers"):
            if key in node:
                parts = [cleaned(part) for part in node[key]]
                return {**node, key: [part for part in parts if part is not None]}
        if node["type"] == "Prepend":
            return None
        changed = dict(node)
        if "prepend_scheme" in node:
            changed["prepend_scheme"] = "never"
        if "add_prefix_space" in node:
            changed["add_prefix_space"] = False
        return changed

    return {
        **config,
        "normalizer": cleaned(config["normalizer"]),
        "pre_tokenizer": cleaned(config["pre_tokenizer"]),
        "post_processor": None,
    }
