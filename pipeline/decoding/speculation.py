"""Speculative guidance: the model of the ARMs drafts tokens, the base reads all of them in one forward.

Nothing about a row changes. A row's tokens are drawn with numbers of its own, one for each place. The draft draws with
the same numbers, from a law that stands in for the guided one, and a drafted token is kept if the guided law draws it
as well. So a row is what step by step decoding makes of it, up to rounding: exactly the guided law, where rejection
sampling (Leviathan et al., arXiv 2211.17192) would keep somewhat more drafts and draw other rows.

Shapes: B rows, T tokens of a round, V vocabulary.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.points import REFERENCE
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.batch import Arms, Batch, Drawn, Row
from pipeline.decoding.cuda_graphs import Arriving
from pipeline.decoding.request import Generation

MOST = 8  # tokens that are drafted at most
_TIMED = {0: 6, 1: 3, 3: 3}  # rounds of a length that are timed before any is chosen
_NEWEST = 15  # rounds that a time is the median of
_WORTH = {False: 1.08, True: 1.03}  # times faster: for drafting to begin, and to go on
_RECHECK = 64  # time between two trials of a length that seems not to pay, in its rounds
_SMOOTHING = 0.2  # share of a round of ten drafted tokens in the acceptance
_CONCENTRATION = 6.0  # of the guided law around a draft's; with 3 to 12 drafts are right as often
_EDGE = 1e-6


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens that a round makes of each row: 1 + a + … + a^γ (arXiv 2211.17192, equation 1).

    Args:
        acceptance: the probability that the guided law draws what was drafted, in [0, 1].
        drafted: γ, the tokens drafted in a round.
    """
    return sum(acceptance**place for place in range(drafted + 1))


def likely_draw(logps_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The token that each number most likely draws from a law that is like this one: tokens_B.

    Inverting this law itself at the number is a poor guess where the two laws' masses before a token differ a little.
    So the other law is taken for random, a Dirichlet process around this one: its cumulative mass up to a token, where
    this one has F, is then Beta(c F, c (1 − F)), and u draws the token v with the probability that the mass before v is
    at most u, less the probability that the mass up to v is. Both by the normal distribution of like mean and variance.
    """
    upper_BV = logps_BV.exp().cumsum(-1).clamp_(_EDGE, 1 - _EDGE)
    deviation_BV = (upper_BV * (1 - upper_BV) / (_CONCENTRATION + 1)).sqrt_()
    below_BV = torch.special.ndtr((uniforms_B.to(upper_BV)[:, None] - upper_BV) / deviation_BV)
    return (F.pad(below_BV, (1, 0), value=1.0)[:, :-1] - below_BV).argmax(-1)


@dataclass
class DraftLength:
    """How many tokens to draft: as many as make most tokens per second, by the rounds so far; none where that is best.

    Times are of whole rounds, by the number of rows (doubling from one class to the next), medians of the newest; the
    acceptance is that of all rows. A length that was not timed yet lies on the line through the two next to it.

    Args:
        fixed: always so many.
        clock: seconds.
    """

    fixed: int | None = None
    clock: Callable[[], float] = time.perf_counter
    acceptance: float = 0.6
    _seconds: dict[int, dict[int, deque[float]]] = field(default_factory=dict)  # by class and length
    _paying: dict[int, bool] = field(default_factory=dict)  # by class
    _since: float = 0.0  # seconds since a length was last tried

    def pays(self, rows: int) -> bool:
        """Whether to draft for so many rows at all; at first not, until that is known."""
        if self.fixed is not None:
            return self.fixed > 0
        kind = rows.bit_length()
        if self._untimed(rows) is None:
            # Turning round makes the drafting models read their rows anew, and rows that take different numbers of
            # tokens end one by one, so a little gain is not worth it.
            best = max(self.speed(rows, length) for length in range(1, MOST + 1))
            self._paying[kind] = best > self.speed(rows, 0) * _WORTH[self._paying.get(kind, False)]
        return self._paying.get(kind, False)

    def choose(self, rows: int, most: int = MOST) -> int:
        """The length of the next round.

        Args:
            rows: that go on.
            most: tokens of use, since no row has room for more.
        """
        if self.fixed is not None:
            return min(self.fixed, most)
        untimed = self._untimed(rows)
        if untimed is not None or not most:
            return untimed if untimed is not None and untimed <= most else 0
        best = max(range(1, min(most, MOST) + 1), key=lambda length: self.speed(rows, length)) if self.pays(rows) else 0
        # What was slow for a moment is not so for ever: now and then the neighbour is tried that was timed least.
        timed = self._seconds[rows.bit_length()]
        near = [length for length in (best - 1, best + 1) if 0 <= length <= min(most, MOST)]
        other = min(near, key=lambda length: len(timed.get(length, ())))
        if self._since > _RECHECK * self._time(rows, other):
            self._since = 0.0
            return other
        return best

    def speed(self, rows: int, length: int) -> float:
        """Tokens per second and row to be expected."""
        return expected_tokens(self.acceptance, length) / self._time(rows, length)

    def note(self, rows: int, length: int, seconds: float, tested: int, accepted: int) -> None:
        """Learn from a round: its time, and how many drafted tokens the guided law was asked about and drew."""
        self._since += seconds
        times = self._seconds.setdefault(rows.bit_length(), {}).setdefault(length, deque(maxlen=_NEWEST))
        times.append(seconds)
        if tested:
            self.acceptance += _SMOOTHING * min(1.0, tested / 10) * (accepted / tested - self.acceptance)

    def note_beside(self, rows: int, seconds: float) -> None:
        """Learn from a step without drafts that is slowed down by what reads beside: plain decoding takes no longer."""
        self.note(rows, 0, min(seconds, self._time(rows, 0)), 0, 0)

    def _untimed(self, rows: int) -> int | None:
        """A length that is to be timed before any can be chosen; None: it is known what they take."""
        timed = self._seconds.get(rows.bit_length(), {})
        for length, rounds in _TIMED.items():
            if len(timed.get(length, ())) < rounds:
                return length
        return None

    def _time(self, rows: int, length: int) -> float:
        medians = {each: median(times) for each, times in self._seconds.get(rows.bit_length(), {}).items()}
        if length in medians or len(medians) < 2:
            return medians.get(length, math.inf)
        one, other = sorted(medians, key=lambda each: abs(each - length))[:2]
        line = medians[one] + (medians[other] - medians[one]) / (other - one) * (length - one)
        return max(line, medians[one] if length > one else 0.0, 1e-9)


class SpeculativeBatch(Batch):
    """A batch whose step may be a round: tokens drafted by the backbones beside the base, and one forward of the base.

    Args:
        backbones: the base's, and others with its vocabulary.
        vocab_size: V.
        length: how many tokens to draft.
    """

    def __init__(self, backbones: Sequence[Backbone], vocab_size: int, length: DraftLength) -> None:
        super().__init__(backbones, vocab_size)
        self._length = length
        self._drafting = [number for number in self._lanes if number]
        self._reference = any(REFERENCE in backbones[number].lanes for number in self._drafting)
        self._stand_in = False  # whether what the ARMs were made from reads the rows, to stand in for the base

    def admit_rows(self, newcomers: Sequence[Row]) -> None:
        """As `Batch.admit_rows`; where drafts pay, what the ARMs were made from reads the new rows as well."""
        if not self.alive:
            self._stand_in = self._reference and self._length.pays(len(newcomers))
        for row in newcomers:
            row.stand_in = self._stand_in
        super().admit_rows(newcomers)
        weight_B = torch.ones(len(self.rows)) if self._base_weight_B is None else self._base_weight_B
        self._known_B = weight_B.to(self._device) == 0.0  # the draft's law is the guided one itself

    @property
    def drafts(self) -> bool:
        """Whether any row is read by what could draft for it."""
        return any(self._lanes[number].rows for number in self._drafting)

    def step(self) -> list[tuple[Row, Generation]]:
        """Draw one token per row, or several; return the rows that ended."""
        started, alive = self._length.clock(), [row for row in self.rows if not row.ended]
        room = max(row.request.max_new_tokens - len(row.tokens) for row in alive) - 1
        if self._reference and room and self._length.pays(len(alive)) != self._stand_in:
            self._stand_in = not self._stand_in
            self._read_anew()
        count = self._length.choose(len(alive), room) if self.drafts else 0
        ended, tested, accepted = self._round(count) if count else (super().step(), 0, 0)
        seconds = self._length.clock() - started
        if self._stand_in and not count:
            self._length.note_beside(len(alive), seconds)
        elif self.drafts:  # drafts that the stand-in would have made better say nothing of how often they are right
            self._length.note(len(alive), count, seconds, tested if self._stand_in == self._reference else 0, accepted)
        return ended

    def _read_anew(self) -> None:
        """Let the drafting models read all rows from their beginning, with the stand-in or without it."""
        self._take_back()
        for row in self.rows:
            row.stand_in = self._stand_in
        for number in self._drafting:
            texts = [(*row.prompts[number], *row.tokens) for row in self.rows]
            self._lanes[number].admit_rows([], texts, [(place, row.lanes) for place, row in enumerate(self.rows)])

    def _round(self, count: int) -> tuple[list[tuple[Row, Generation]], int, int]:
        """Draft so many tokens and let the guided law draw; the rows that ended, tokens tested, and tokens accepted."""
        self._take_back()
        drafts_TB, arms_T = self._draft(count)
        self._lanes[0].step(torch.stack(drafts_TB, dim=1))
        drawn: list[Drawn] = []
        # Behind its first token that was not drafted, what is drawn for a row counts no more.
        live_TB = [torch.tensor([not row.ended for row in self.rows], device=self._device)]
        sums_TBN = [self._sums_BN]
        for place in range(count + 1):
            base_BV, arms = self._base_logits(place), {**self._arms_of([0], place), **arms_T[place]}
            drawn.append(self._drawn(self._law(base_BV, arms), base_BV, arms, place))
            sums_TBN.append(sums_TBN[-1] + F.pad(drawn[-1].summands_B3, (0, 1)))
            if place < count:
                live_TB.append(live_TB[-1] & (drawn[-1].tokens_B == drafts_TB[place + 1]))
                # Off a GPU looking at the numbers waits for nothing.
                if self._device.type == "cpu" and not bool(live_TB[-1].any()):
                    break
        return self._settle(count, drawn, torch.stack(live_TB[: len(drawn)]), torch.stack(sums_TBN))

    def _draft(self, count: int) -> tuple[list[Tensor], list[Arms]]:
        """Each row's last token and `count` drafted ones, and the ARMs' logits behind each: tokens_TB."""
        tokens_TB, arms_T = [self._last_B], list[Arms]()
        for place in range(count + 1):
            for number in self._drafting:
                if self._lanes[number].rows:
                    self._lanes[number].step(tokens_TB[-1][:, None])
            arms_T.append(self._arms_of(self._drafting))
            if place < count:
                tokens_TB.append(self.proposals(arms_T[-1], place))
        return tokens_TB, arms_T

    def proposals(self, arms: Arms, ahead: int) -> Tensor:
        """What each row's next token but `ahead` is drafted to be, by what the drafting ARMs make of it: tokens_B."""
        drafting = {name: arms[name] for number in self._drafting for name in self._lanes[number].rows}
        law_BV = self._law(stand_in(drafting, len(self.rows), self._vocab_size), drafting)
        return torch.where(self._known_B, self._draw(law_BV, ahead), likely_draw(law_BV, self._uniforms(ahead)))

    def _settle(
        self, count: int, drawn: Sequence[Drawn], live_TB: Tensor, sums_TBN: Tensor
    ) -> tuple[list[tuple[Row, Generation]], int, int]:
        """Give rows the tokens that count, and let the models forget those they have read in vain."""
        tokens_TB = torch.stack([one.tokens_B for one in drawn])
        every_B = torch.arange(len(self.rows), device=self._device)
        finite = torch.stack([one.summands_B3.isfinite().all() for one in drawn]).all()
        arriving = Arriving(torch.cat([tokens_TB.flatten(), live_TB.flatten(), finite[None]]))
        taken_B = live_TB.sum(0)
        self._sums_BN = sums_TBN[taken_B, every_B]
        self._drawn_B += taken_B
        self.append(tokens_TB[(taken_B - 1).clamp_min(0), every_B])
        for lanes in self._lanes.values():
            if lanes.rows:
                lanes.rewind(count + 1 - taken_B)
        *numbers, finite = arriving.tolist()
        if not finite:
            for place, one in enumerate(drawn):
                if not bool((one.summands_B3.isfinite().all(-1) | ~live_TB[place]).all()):
                    self._blame(one, place)
        rows, places = len(self.rows), len(drawn)
        tokens_T, live_T = (
            [part[at * rows :][:rows] for at in range(places)] for part in (numbers, numbers[rows * places :])
        )
        tested = sum(min(taken, count) for taken in map(sum, zip(*live_T, strict=True)))
        accepted = sum(map(sum, live_T[1:]))
        ended: list[tuple[Row, Generation]] = []
        for row in self.rows:
            row.drafted += 0 if row.ended else count
        for place, (tokens, live) in enumerate(zip(tokens_T, live_T, strict=True)):
            for row, goes in zip(self.rows, live, strict=True):
                row.accepted += bool(place and goes and not row.ended)
            taking = [token if goes else None for token, goes in zip(tokens, live, strict=True)]
            ended += self._ended(taking, drawn[place], sums_TBN[place + 1])
        return ended, tested, accepted

    def _generation(self, row: Row, finish: str, sums: Sequence[float]) -> Generation:
        positions = len(row.tokens) + row.drafted - row.accepted
        return replace(
            super()._generation(row, finish, sums), drafted=row.drafted, accepted=row.accepted,
            forwards=len(row.lanes) * positions,
        )  # fmt: skip


def stand_in(arms: Arms, rows: int, vocab_size: int) -> Tensor:
    """What drafts put in the place of the base: values_BV, zeros at rows that none of the ARMs reads.

    What the ARMs were made from, where it reads a row; else the mean of the ARMs by their weights, so that one ARM
    alone drafts from π_r^(1 + α).

    Args:
        arms: of the drafting backbones.
        rows: B.
        vocab_size: V.
    """
    device = next(iter(arms.values()))[2].device
    total_BV, weight_B1 = (torch.zeros(rows, size, device=device) for size in (vocab_size, 1))
    for name, (at_b, alpha_b, logits_bV) in arms.items():
        if name != REFERENCE:
            weight_b1 = alpha_b.clamp_min(0.0)[:, None]
            total_BV.index_add_(0, at_b, (logits_bV * weight_b1).to(total_BV))
            weight_B1.index_add_(0, at_b, weight_b1)
    total_BV /= weight_B1.masked_fill(weight_B1 == 0, 1.0)
    if REFERENCE in arms:
        at_b, _, logits_bV = arms[REFERENCE]
        total_BV.index_copy_(0, at_b, logits_bV.to(total_BV))
    return total_BV
