"""Speculative guidance: the model of the ARMs drafts tokens, the base reads all of them in one forward.

Nothing about a row changes. A row's tokens are drawn with numbers of its own, one for each place. The draft draws with
the same numbers, from a law that stands in for the guided one, and a drafted token is kept if the guided law draws it
as well. So a row is what step by step decoding makes of it, up to rounding: exactly the guided law, where rejection
sampling (Leviathan et al., arXiv 2211.17192) would keep somewhat more drafts and draw other rows.

Shapes: B rows, T tokens of a round, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.points import REFERENCE
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.batch import Arms, Batch, Drawn, Row
from pipeline.decoding.cuda_graphs import Arriving
from pipeline.decoding.request import Generation

MOST = 8  # tokens that are drafted at most
_MEASURED = 2  # rounds of a length whose time is known well enough to choose by
_WORTH = 1.03  # times faster
_RECHECK = 64  # time between two trials of a length that seems not to pay, in its rounds
_SMOOTHING = 0.2  # share of the newest round in a mean
_CONCENTRATION = 6.0  # of the guided law around a draft's: from 3 to 12 drafts are right as often (acceptance.csv)
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

    Times are of whole rounds, by the number of rows (doubling from one class to the next); the acceptance is that of
    all rows. A length that was not timed yet is taken to lie on the line through two that were.

    Args:
        fixed: always so many.
        clock: seconds.
    """

    fixed: int | None = None
    clock: Callable[[], float] = time.perf_counter
    acceptance: float = 0.6
    _seconds: dict[int, dict[int, tuple[float, int]]] = field(default_factory=dict)  # by class and length: mean, rounds
    _paying: dict[int, bool] = field(default_factory=dict)  # by class
    _since: float = 0.0  # seconds since a length was last tried

    def pays(self, rows: int) -> bool:
        """Whether to draft for so many rows at all; at first not, until that is known."""
        if self.fixed is not None:
            return self.fixed > 0
        kind = rows.bit_length()
        if not self._untimed(rows):
            # Turning round makes the drafting models read their rows anew, so a little gain is not worth it.
            best, now = max(self.speed(rows, length) for length in range(1, MOST + 1)), self._paying.get(kind, False)
            self._paying[kind] = best > self.speed(rows, 0) * (1 / _WORTH if now else _WORTH)
        return self._paying.get(kind, False)

    def choose(self, rows: int, most: int = MOST) -> int:
        """The length of the next round.

        Args:
            rows: that go on.
            most: tokens of use, since no row has room for more.
        """
        if self.fixed is not None:
            return min(self.fixed, most)
        untimed = [length for length in self._untimed(rows) if length <= most]
        if untimed:
            return untimed[0]
        if not self._seconds.get(rows.bit_length()):
            return 0
        pays, most = self.pays(rows), min(most, MOST)
        best = max(range(1, most + 1), key=lambda length: self.speed(rows, length)) if pays and most else 0
        other = best + 1 if best < most else best - 1
        if other > 0 and self._since > _RECHECK * self._time(rows, other):
            self._since = 0.0  # what was slow for a moment is not so for ever
            return other
        return best

    def speed(self, rows: int, length: int) -> float:
        """Tokens per second and row to be expected."""
        return expected_tokens(self.acceptance, length) / self._time(rows, length)

    def note(self, rows: int, length: int, seconds: float, drafted: int, accepted: int) -> None:
        """Learn from a round: its time, and how many drafted tokens the guided law was asked about and drew."""
        self._since += seconds
        timed = self._seconds.setdefault(rows.bit_length(), {})
        mean, count = timed.get(length, (seconds, 0))
        # The first round of a kind compiles, captures or warms caches: the second takes its place.
        share = 1.0 if count < 2 else _SMOOTHING
        timed[length] = mean + share * (seconds - mean), count + 1
        if drafted:
            weight = _SMOOTHING * min(1.0, drafted / 10)
            self.acceptance += weight * (accepted / drafted - self.acceptance)

    def _untimed(self, rows: int) -> list[int]:
        """What is to be timed before anything can be chosen."""
        timed = self._seconds.get(rows.bit_length(), {})
        return [length for length in (0, 1) if timed.get(length, (0.0, 0))[1] < _MEASURED]

    def _time(self, rows: int, length: int) -> float:
        timed = self._seconds[rows.bit_length()]
        if length in timed:
            return timed[length][0]
        (one, at), (other, beside) = sorted(
            ((each, timed[each][0]) for each in timed), key=lambda one: abs(one[0] - length)
        )[:2]
        line = at + (beside - at) / (other - one) * (length - one)
        return max(line, at if length > one else 0.0, 1e-9)


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
        # What a stand-in would change is not learnt from: a step that it slows down, and drafts that it did not make.
        if self.drafts and (count or not self._stand_in):
            tested = tested if self._stand_in or not self._reference else 0
            self._length.note(len(alive), count, self._length.clock() - started, tested, accepted)
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
        tokens_TB, each = (
            torch.stack([one.tokens_B for one in drawn]),
            torch.arange(len(self.rows), device=self._device),
        )
        finite = torch.stack([one.summands_B3.isfinite().all() for one in drawn]).all()
        arriving = Arriving(torch.cat([tokens_TB.flatten(), live_TB.flatten(), finite[None]]))
        taken_B = live_TB.sum(0)
        self._sums_BN = sums_TBN[taken_B, each]
        self._drawn_B += taken_B
        self.append(tokens_TB[(taken_B - 1).clamp_min(0), each])
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
