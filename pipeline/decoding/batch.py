"""What is asked, what comes out, and the rows in between: one step of the guided law for all of them.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pipeline.config.errors import UserError
from pipeline.config.points import BASE, REFERENCE
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.cross_tokenizer.answers import Answers
from pipeline.decoding.cross_tokenizer.bridge import TokenizerBridge
from pipeline.decoding.cross_tokenizer.session import CrossTokenizerSession
from pipeline.decoding.cuda_graphs import Arriving
from pipeline.decoding.guidance import (
    cut,
    draw,
    guided_logps,
    kl_divergence,
    normalised,
    random_stream,
    truncate,
)
from pipeline.decoding.request import Generation, Request, until_stop
from pipeline.decoding.static_cache import StaticSession, lanes_of, release

# Per ARM the rows it serves, its α there, and its logits there.
Arms = Mapping[str, tuple[Tensor, Tensor, Tensor]]


@dataclass
class Row:
    """A request on its way."""

    index: int
    request: Request
    prompts: tuple[tuple[int, ...], ...]  # token ids per backbone: each has its own template
    arms: Mapping[str, float]  # the request's by the lanes that read it: those of one mixture are one
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    probed_arms: frozenset[str] = frozenset()  # ARMs that read it, whatever their weight
    rewards: dict[str, list[float]] = field(default_factory=dict)  # of probed ARMs: log π_r − log π_base per token
    stand_in: bool = False  # whether what the ARMs were made from reads it, to draft in the base's place
    drafted: int = 0  # tokens proposed by a draft, and how many of them it has taken: see `speculation`
    accepted: int = 0

    @property
    def lanes(self) -> set[str]:
        """The models that read it."""
        return {BASE, *self.arms, *self.probed_arms, *([REFERENCE] if self.stand_in else [])}

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt as the base reads it."""
        return self.prompts[0]

    @cached_property
    def uniforms(self) -> list[float]:
        """The numbers that draw its tokens."""
        return random_stream(self.request.stream, self.request.max_new_tokens).tolist()

    @cached_property
    def window(self) -> int:
        """How many of the last tokens hold any stop text that has just been completed: a token is a byte at least."""
        return 2 * max(len(text.encode()) for text in self.request.stop) + 8


@dataclass(frozen=True)
class Drawn:
    """A token for each row, and what it was drawn from."""

    tokens_B: Tensor
    summands_B3: Tensor  # log-probability, the base's, and divergence from the base, in nats
    base_BV: Tensor  # logits
    arms: Arms


class Batch:
    """The rows being generated, with what has been summed over their tokens."""

    def __init__(self, backbones: Sequence[Backbone], vocab_size: int, bridge: TokenizerBridge | None = None) -> None:
        self.rows: list[Row] = []
        translated = [] if bridge is None else bridge.backbones
        self._lanes = {number: lanes_of(one) for number, one in enumerate(backbones) if one not in translated}
        self._static = [lanes for lanes in self._lanes.values() if isinstance(lanes, StaticSession)]
        self._ahead = False  # whether the models have read the last tokens already
        self._other_vocabulary = [number for number, one in enumerate(backbones) if one in translated]
        self._ends, self._spell = backbones[0].ends, backbones[0].prompter.spell
        self._arms = [lane for backbone in backbones for lane in backbone.lanes if lane != BASE]
        self._vocab_size, self._device = vocab_size, backbones[0].device
        self._across = None if bridge is None else CrossTokenizerSession(bridge, self._device)
        self._answers: Answers | None = None  # of ARMs of another tokenizer, to the last tokens
        self._last_B = torch.zeros(0, dtype=torch.long, device=self._device)
        self._sums_BN = torch.zeros(0, 4, dtype=torch.float64, device=self._device)  # as in Generation

    @property
    def alive(self) -> int:
        """Rows that go on."""
        return sum(not row.ended for row in self.rows)

    def admit_rows(self, newcomers: Sequence[Row]) -> None:
        """Let ended rows go and add new ones behind those that stay."""
        self._take_back()
        kept = [place for place, row in enumerate(self.rows) if not row.ended]
        for number, lanes in self._lanes.items():
            prompts = sorted({row.prompts[number] for row in newcomers})
            served = [(prompts.index(row.prompts[number]), row.lanes) for row in newcomers]
            lanes.admit_rows(kept, prompts, served)
        if self._across is not None:
            foreign_prompts = [[row.prompts[number] for number in self._other_vocabulary] for row in newcomers]
            self._across.admit_rows(kept, foreign_prompts, [row.lanes for row in newcomers])
        kept_b = torch.tensor(kept, dtype=torch.long, device=self._device)
        self._last_B = torch.cat([self._last_B[kept_b], self._last_B.new_zeros(len(newcomers))])
        self._sums_BN = torch.cat([self._sums_BN[kept_b], self._sums_BN.new_zeros(len(newcomers), 4)])
        self.rows = [*(self.rows[place] for place in kept), *newcomers]
        requests = [row.request for row in self.rows]
        arms = dict.fromkeys([*self._arms, *(arm for row in self.rows for arm in row.arms)])
        self._alpha = {arm: self._tensor([row.arms.get(arm, 0.0) for row in self.rows]) for arm in arms}
        weights = [request.base_weight for request in requests]
        self._base_weight_B = None if all(weight == 1.0 for weight in weights) else self._tensor(weights)
        # A greedy row takes the likeliest token of the law at temperature 1, which is the likeliest at any.
        self._temperature_B = self._tensor([request.temperature or 1.0 for request in requests])
        self._top_k_B = torch.tensor(
            [request.top_k if request.temperature else 1 for request in requests], device=self._device
        )
        self._top_p_B = self._tensor([request.top_p for request in requests])
        self._min_p_B = self._tensor([request.min_p for request in requests])
        cutting_B = (self._top_k_B > 0) | (self._top_p_B < 1) | (self._min_p_B > 0)
        self._cutting = cutting_B.nonzero()[:, 0] if bool(cutting_B.any()) else None
        # The streams of all rows lie on the device: a step picks its numbers without waiting for it.
        longest = max((request.max_new_tokens for request in requests), default=0)
        streams = [[*row.uniforms, *[0.0] * (longest - len(row.uniforms))] for row in self.rows]
        self._uniforms_BT = torch.tensor(streams, dtype=torch.float64, device=self._device)
        self._drawn_B = torch.tensor([len(row.tokens) for row in self.rows], device=self._device)

    def release(self) -> None:
        """Give the models' sessions back, once no row is generated any more."""
        for lanes in self._lanes.values():
            release(lanes)

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def read(self) -> tuple[Tensor, Tensor, Arms]:
        """Let all models read the rows' last tokens: the guided law, the base's logits, and those of the ARMs.

        Returns:
            logps_BV, base_BV, and per ARM the rows it serves, its α there, and its logits there.
        """
        if not self._ahead:
            self._advance()
        self._ahead = False
        if self._across is not None and self._across.rows:
            self._across.step(self._last_B, [not row.ended for row in self.rows])
        base_BV, arms = self._base_logits(), self._arms_of(self._lanes)
        self._answers = None
        if self._across is not None and self._across.rows:
            self._answers = self._across.ask(base_BV, {lane for row in self.rows for lane in row.lanes})
        logps_BV = self._law(base_BV, arms)
        if any(row.probed_arms for row in self.rows):
            arms |= self._answers_of(base_BV)
        return logps_BV, base_BV, arms

    def _answers_of(self, base_BV: Tensor) -> Arms:
        """What ARMs of another tokenizer have said, as of one of the base's."""
        views = {} if self._answers is None else self._answers.over_vocabulary(base_BV)
        return {lane: (at, self._alpha[lane][at], values_bV) for lane, (at, values_bV) in views.items()}

    def _base_logits(self, place: int = -1) -> Tensor:
        """The base's logits behind a token of the last step: base_BV."""
        return cut(self._lanes[0].logits(BASE, place), self._vocab_size)

    def _arms_of(self, numbers: Iterable[int], place: int = -1) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Per ARM of these backbones its rows, its α there, and its logits behind a token of the last step."""
        arms = {}
        for number in numbers:
            lanes = self._lanes[number]
            for lane, rows_b in lanes.rows.items():
                if lane != BASE:
                    at, logits_bV = rows_b.to(self._device), cut(lanes.logits(lane, place), self._vocab_size)
                    arms[lane] = at, self._alpha[lane][at], logits_bV.to(self._device)
        return arms

    def _law(self, base_BV: Tensor, arms: Arms) -> Tensor:
        """The law that tokens are drawn from, truncation included: logps_BV."""
        logps_BV = guided_logps(base_BV, arms.values(), self._temperature_B, self._base_weight_B)
        if self._across is not None and self._answers is not None:
            lanes = self._across.rows
            alphas = {
                lane: self._alpha[lane][lanes[lane]] / self._temperature_B[lanes[lane]] for lane in self._answers.values
            }
            logps_BV = self._answers.guided(logps_BV, alphas)
        if self._cutting is not None:
            at = self._cutting
            logps_BV[at] = truncate(logps_BV[at], self._top_k_B[at], self._top_p_B[at], self._min_p_B[at])
        return logps_BV

    def _advance(self) -> None:
        for lanes in self._lanes.values():
            if lanes.rows:
                lanes.step(self._last_B[:, None])

    def _take_back(self) -> None:
        """Let the models that have read the last tokens ahead of time read them again."""
        if self._ahead:
            self._ahead = False
            for static in self._static:
                if static.rows:
                    static.rewind(torch.ones_like(self._last_B))

    def append(self, tokens_B: Tensor) -> None:
        """Make these the rows' last tokens."""
        self._last_B = tokens_B.to(self._device)

    def step(self) -> list[tuple[Row, Generation]]:
        """Draw one token per row; return the rows that ended."""
        drawn = self._drawn(*self.read())
        self._drawn_B += 1
        # One look at the device per step: what it drew, and whether all of it was a number.
        arriving = Arriving(torch.cat([drawn.tokens_B, drawn.summands_B3.isfinite().all()[None]]))
        self._sums_BN[:, :3] += drawn.summands_B3
        if self._answers is not None:
            self._sums_BN[:, 3] += self._answers.uncovered_mass_B
        self.append(drawn.tokens_B)
        if self._goes_on():
            self._advance()
            self._ahead = True
        *tokens, finite = arriving.tolist()
        if not finite:
            self._blame(drawn)
        return self._ended(tokens, drawn, self._sums_BN)

    def _drawn(self, logps_BV: Tensor, base_BV: Tensor, arms: Arms, ahead: int = 0) -> Drawn:
        """Draw every row's next token but `ahead` from its guided law."""
        base_logps_BV, tokens_B = normalised(base_BV), self._draw(logps_BV, ahead)
        drawn_B1 = tokens_B[:, None]
        of_token_BN = [logps_BV.gather(1, drawn_B1)[:, 0], base_logps_BV.gather(1, drawn_B1)[:, 0]]
        summands_B3 = torch.stack([*of_token_BN, kl_divergence(logps_BV, base_logps_BV)], dim=1)
        return Drawn(tokens_B, summands_B3, base_BV, arms)

    def _draw(self, logps_BV: Tensor, ahead: int = 0) -> Tensor:
        """Each row's next token but `ahead`: tokens_B."""
        return draw(logps_BV, self._uniforms(ahead))

    def _uniforms(self, ahead: int) -> Tensor:
        """The number that draws each row's next token but `ahead`: uniforms_B."""
        # Ended rows draw on, unheard.
        place_B1 = (self._drawn_B + ahead).clamp_max(self._uniforms_BT.shape[1] - 1)[:, None]
        return self._uniforms_BT.gather(1, place_B1)[:, 0]

    def _goes_on(self) -> bool:
        """Whether models read the new tokens before they are looked at here: the device then never waits for Python.

        In vain where a row ends, so not for many rows, nor where one reaches its length.
        """
        last = any(len(row.tokens) + 1 >= row.request.max_new_tokens for row in self.rows if not row.ended)
        return not last and len(self._static) == len(self._lanes) and all(lanes.small for lanes in self._static)

    def _ended(self, tokens: Sequence[int | None], drawn: Drawn, sums_BN: Tensor) -> list[tuple[Row, Generation]]:
        """Give each row that goes on the token drawn for it, if it has one; the rows that end with it."""
        taking = [not row.ended and token is not None for row, token in zip(self.rows, tokens, strict=True)]
        if any(row.probed_arms for row in self.rows):
            self._reward(drawn, taking)
        ended = []
        for place, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if row.ended or token is None:
                continue
            row.tokens.append(token)
            if finish := self._finish(row):
                row.ended = True
                ended.append((row, self._generation(row, finish, sums_BN[place].tolist())))
        return ended

    def _generation(self, row: Row, finish: str, sums: Sequence[float]) -> Generation:
        text = until_stop(self._spell(row.tokens), row.request.stop).strip()
        logp, logp_base, kl, left_out = sums
        # Only where the request does not tell: it names each ARM of a mixture, and one lane reads for all.
        forwards = None if len(row.arms) == len(row.request.arms) else (1 + len(row.arms)) * len(row.tokens)
        generation = Generation(text, len(row.ids), row.tokens, finish, logp, logp_base, kl, forwards)
        return generation if self._across is None else replace(generation, left_out=left_out)

    def _reward(self, drawn: Drawn, taking: Sequence[bool]) -> None:
        """Note down what the probed ARMs say of the tokens that rows are taking."""
        base_logps_BV, drawn_B1 = normalised(drawn.base_BV), drawn.tokens_B[:, None]
        for name, (at_b, _, logits_bV) in drawn.arms.items():
            drawn_b1 = drawn_B1[at_b]
            rewards_b1 = normalised(logits_bV).gather(1, drawn_b1) - base_logps_BV[at_b].gather(1, drawn_b1)
            for place, reward in zip(at_b.tolist(), rewards_b1[:, 0].tolist(), strict=True):
                row = self.rows[place]
                if name in row.probed_arms and taking[place]:
                    row.rewards.setdefault(name, []).append(reward)

    def _finish(self, row: Row) -> str | None:
        if row.tokens[-1] in self._ends:
            return "eos"
        if row.request.stop:
            tail = self._spell(row.tokens[-row.window :])
            if any(text in tail for text in row.request.stop):
                return "stop"
        return "length" if len(row.tokens) >= row.request.max_new_tokens else None

    def _blame(self, drawn: Drawn, ahead: int = 0) -> None:
        """Say which model gave logits that are not finite, and at which row."""
        everywhere = torch.arange(len(self.rows), device=self._device)
        logits = {BASE: (everywhere, drawn.base_BV)}
        arms = {**drawn.arms, **self._answers_of(drawn.base_BV)}
        logits |= {name: (rows_b, logits_bV) for name, (rows_b, _, logits_bV) in arms.items()}
        for name, (rows_b, logits_bV) in logits.items():
            for row in rows_b[~logits_bV.isfinite().all(-1)].tolist():
                at = self.rows[row]
                raise UserError(
                    f"{name} gave logits that are not finite at token {len(at.tokens) + 1 + ahead} of the response to "
                    f"{at.request.prompt[:60]!r}: set base.dtype=float32, or check that model's weights."
                )
        raise UserError("the guided sum is not finite although every model's logits are: lower the weights.")
