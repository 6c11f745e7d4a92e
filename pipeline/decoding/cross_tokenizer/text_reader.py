"""Models of any tokenizer reading texts that grow: what each says of its own next token, and of the next byte.

What a model that writes tokens says of a text's next byte is what it says of all continuations that begin with that
byte: canonical tokens spell a part of the text, and one more token covers the rest of it and goes on (Hayase et al.,
arXiv 2506.14123).

Shapes: A vocabulary of a model.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from pipeline.decoding.backbone import Backbone
from pipeline.decoding.cross_tokenizer.rewindable_cache import RewindableCache
from pipeline.decoding.cross_tokenizer.spelling import Spelling

_HELD = 4  # tokens at the end of a text
END = 256  # the entry of a law of bytes that says that the text ends


@dataclass(frozen=True)
class ReadText:
    """A text as a lane has read it."""

    lane: str
    row: int
    tokens: tuple[int, ...]  # its canonical spelling
    logp: float  # log P of exactly these tokens
    next_A: Tensor  # log P of the token behind them


class TextReader:
    """Rows of texts on a backbone, each behind its prompt and read by some of the lanes.

    A text is read in its canonical tokens; where it grows so that its last tokens are spelled otherwise, those are read
    anew.

    Args:
        backbone: the model and its lanes.
        spelling: its tokens.
        prompts: per row, token ids, at least one.
        served: per row, the lanes that read it.
    """

    def __init__(
        self, backbone: Backbone, spelling: Spelling, prompts: Sequence[Sequence[int]],
        served: Sequence[Collection[str]],
    ) -> None:  # fmt: skip
        self.spelling = spelling
        self.positions = [0] * len(prompts)  # that were computed for each row behind its prompt
        self._cache = RewindableCache(backbone)
        self._last = [prompt[-1] for prompt in prompts]
        self._starts = [len(prompt) - 1 for prompt in prompts]  # where that token stands
        distinct = sorted({tuple(prompt) for prompt in prompts})
        places = [distinct.index(tuple(prompt)) for prompt in prompts]
        self._cache.admit_rows([], distinct, list(zip(places, served, strict=True)))
        self._tokens: list[tuple[int, ...]] = [()] * len(prompts)  # of what has been read of each row
        self._logps = [[0.0] for _ in self._cache.slots]  # per slot, log P of the first 0, 1, … of them
        # Per slot, by how many of them, what is said of the next one; of the last few, the ones that may yet change.
        self._laws = [dict[int, Tensor]() for _ in self._cache.slots]

    def read(self, texts: Mapping[int, bytes]) -> Iterator[ReadText]:
        """Read the texts of some rows, in every lane that serves them.

        Args:
            texts: by row.

        Raises:
            UserError: the context is full.
        """
        slots = [slot for slot, (_, row) in enumerate(self._cache.slots) if row in texts]
        tokens = {row: self.spelling.spell(text) for row, text in texts.items()}
        known = {row: _common(new, self._tokens[row]) for row, new in tokens.items()}
        # Where what the last token that stays says of the next one was not kept, that token is read again.
        again = {row for slot in slots if known[row := self._row(slot)] not in self._laws[slot]}
        starts = {row: known[row] + (row not in again) for row in tokens}
        reads = {row: (self._last[row], *new)[starts[row] :] for row, new in tokens.items()}
        self._read([slot for slot in slots if reads[self._row(slot)]], starts, reads)
        self._tokens = [tokens.get(row, new) for row, new in enumerate(self._tokens)]
        for slot in slots:
            lane, row = self._cache.slots[slot]
            new, laws, logps = tokens[row], self._laws[slot], self._logps[slot][: known[row] + 1]
            for place in range(known[row], len(new)):
                logps.append(logps[-1] + float(laws[place][new[place]]))
            self._logps[slot] = logps
            self._laws[slot] = {size: law_A for size, law_A in laws.items() if size > len(new) - _HELD}
            yield ReadText(lane, row, new, logps[-1], laws[len(new)])

    def _read(self, slots: Sequence[int], starts: Mapping[int, int], reads: Mapping[int, Sequence[int]]) -> None:
        """Read tokens of rows, from a place on that is counted from the prompt's last token."""
        if not slots:
            return
        rows = [self._row(slot) for slot in slots]
        found_STA = self._cache.read(
            slots, [self._starts[row] + starts[row] for row in rows], [reads[row] for row in rows]
        )
        for slot, row, laws_TA in zip(slots, rows, found_STA, strict=True):
            before = {size: law_A for size, law_A in self._laws[slot].items() if size < starts[row]}
            self._laws[slot] = before | dict(enumerate(laws_TA[: len(reads[row])], start=starts[row]))
            self.positions[row] += len(reads[row])

    def _row(self, slot: int) -> int:
        return self._cache.slots[slot][1]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class ByteReader:
    """A `TextReader` whose texts grow a byte at a time: what every lane says of the next byte.

    Args:
        reader: of rows of which nothing has been read.
        ends: the tokens of its model that end a text.
    """

    def __init__(self, reader: TextReader, ends: Collection[int]) -> None:
        self._reader, self._ends = reader, sorted(ends)
        # Per lane and row, the beginnings of its text that one more token may cover the rest of and go on: where each
        # ends, its log P, and the next token's law there.
        self._open: dict[tuple[str, int], dict[int, tuple[float, Tensor]]] = {}

    def read(self, texts: Mapping[int, bytes]) -> dict[tuple[str, int], Tensor]:
        """By lane and row, log P of the next byte behind a text, or of its end: logps of 257.

        Args:
            texts: by row, each as it was or longer by a byte.

        Raises:
            UserError: the context is full.
        """
        return {(one.lane, one.row): self._bytes(one, texts[one.row]) for one in self._reader.read(texts)}

    def _bytes(self, read: ReadText, text: bytes) -> Tensor:
        spelling, beginnings = self._reader.spelling, self._open.setdefault((read.lane, read.row), {})
        whole = spelling.joined(read.tokens) == text  # else no tokens spell it, and it is no place to go on from
        if whole:
            beginnings[len(text)] = read.logp, read.next_A
        mass = torch.zeros(END + 1, dtype=torch.float64, device=read.next_A.device)
        most = max((logp for logp, _ in beginnings.values()), default=0.0)
        for place, (logp, law_A) in list(beginnings.items()):
            tokens_K, bytes_K = (found.to(mass.device) for found in spelling.branches(text[place:]))
            if not len(tokens_K):
                del beginnings[place]
                continue
            own = tokens_K < len(law_A)
            probs_K = (law_A[tokens_K[own]].double() + (logp - most)).exp()
            mass.index_add_(0, bytes_K[own], probs_K)
        if whole:
            mass[END] = (read.next_A[self._ends].double() + (read.logp - most)).exp().sum()
        return mass.log().log_softmax(0)
