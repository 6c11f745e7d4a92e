"""Nudging (Fei et al., arXiv 2410.09300): where the base is unsure, a small aligned model writes the next words.

The small model writes the first word, and others until the base's likeliest next token has a probability of γ; the base
writes on until it is below that again. Here both sample, the small model from π_ref Π_i (π_i / π_ref)^α_i: one ARM by
itself at α = 1. What two tokenizers have written has no law over the base's tokens, so there is no KL to report.

Shapes: V vocabulary of whichever model writes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config.points import BASE
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.cross_tokenizer.spelling import Spelling
from pipeline.decoding.cross_tokenizer.text_reader import TextReader
from pipeline.decoding.guidance import draw, random_generator
from pipeline.generation.methods.search import Found
from pipeline.generation.methods.text_search import TextSearch


@dataclass
class _Written:
    """A row on its way."""

    found: Found
    stream: np.random.Generator
    text: bytes = b""
    word: bytes | None = b""  # the small model's, which it is in; None: the base writes

    def draw(self, logps_V: Tensor) -> int:
        """A token of the model that writes."""
        uniform_B = torch.tensor([self.stream.random()], dtype=torch.float64, device=logps_V.device)
        return int(draw(logps_V[None], uniform_B))


class Nudging(TextSearch):
    """`TextSearch` by models that write in turn.

    Args:
        base, beside, batch_size: as in `TextSearch`.
        threshold: γ.
    """

    def __init__(self, base: Backbone, beside: Sequence[Backbone], batch_size: int, threshold: float) -> None:
        super().__init__(base, beside, batch_size)
        self._sure = math.log(threshold)
        self._small = next(
            place for place, backbone in enumerate(self._backbones) if self._reference in backbone.lanes
        )  # whose tokens the small model writes

    def search(self, rows: list[Found]) -> None:
        """Let each row's writer write a token until all have ended."""
        readers = self._readers(rows)
        written = [_Written(row, random_generator(row.request.stream)) for row in rows]
        while any(row.finish is None for row in rows):
            self._base_writes(written, readers[0])
            self._small_writes(written, readers)
        for place, row in enumerate(rows):
            row.logp = row.kl = math.nan
            row.forwards = sum(reader.positions[place] for reader in readers)
        spelling = self._spellings[0]
        for read in readers[0].read({place: spelling.joined(tuple(row.tokens)) for place, row in enumerate(rows)}):
            if read.lane == BASE:
                row = rows[read.row]
                row.logp_base = read.logp + (float(read.next_A[self._prompter.eos]) if row.finish == "eos" else 0.0)

    def _base_writes(self, written: Sequence[_Written], reader: TextReader) -> None:
        """A token by the base in the rows where it is its turn; where it is unsure, it is so no more."""
        for read in reader.read({place: row.text for place, row in _going(written) if row.word is None}):
            row = written[read.row]
            if read.lane == BASE and float(read.next_A.max()) < self._sure:
                row.word = b""
            elif read.lane == BASE:
                self._write(row, row.draw(read.next_A), self._spellings[0], self._ends)

    def _small_writes(self, written: Sequence[_Written], readers: Sequence[TextReader]) -> None:
        """A token by the small model in the rows where it is its turn; where that begins another word, none."""
        texts = {place: row.text for place, row in _going(written) if row.word is not None}
        laws = {(read.lane, read.row): read.next_A for reader in readers for read in reader.read(texts)}
        spelling, ends = self._spellings[self._small], self._backbones[self._small].ends
        for place in texts:
            row, law_V = written[place], laws[self._reference, place]
            for name, alpha in row.found.request.arms.items():
                law_V = law_V + alpha * (laws[name, place] - laws[self._reference, place])
            token = row.draw(law_V.log_softmax(-1))
            piece = spelling.pieces[token] or b""
            if row.word and row.word.strip() and piece[:1].isspace():
                row.word = None
            else:
                row.word = (row.word or b"") + piece
                self._write(row, token, spelling, ends)

    def _write(self, row: _Written, token: int, spelling: Spelling, ends: frozenset[int]) -> None:
        """Put a token behind a row, which ends with an end or with the last token of the base that it may have."""
        row.text += b"" if token in ends else spelling.pieces[token] or b""
        tokens, most = self._spellings[0].spell(row.text), row.found.request.max_new_tokens
        if token in ends:
            row.found.finish, row.found.tokens = "eos", [*tokens[: most - 1], self._prompter.eos]
        elif len(tokens) > most:  # only now it is known that the last token stays as it is
            row.found.finish, row.found.tokens = "length", list(tokens[:most])


def _going(written: Sequence[_Written]) -> list[tuple[int, _Written]]:
    """The rows that have not ended."""
    return [(place, row) for place, row in enumerate(written) if row.found.finish is None]
