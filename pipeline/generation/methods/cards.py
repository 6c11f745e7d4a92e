"""CARDS (Li et al., 2024): segments of the base's own text, kept or drawn again by the reward of the text with them.

A segment ends before a token of which the base is unsure. It is kept with probability min(1, exp((r − τ) / ς)), where
the bar τ rises with the length of the text from 0 to the target; what is drawn and not kept has no tractable law, so
there is no KL to report.

Shapes: B rows, T positions, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.decoding.guidance import draw, entropy, random_generator
from pipeline.generation.methods.lookahead_cache import TextReward
from pipeline.generation.methods.search import Found, Search
from pipeline.models.prompting import Prompter


@dataclass
class _Segment:
    """Tokens proposed for a row, and the best proposal of this segment so far."""

    tokens: list[int] = field(default_factory=list)
    logp: float = 0.0
    closed: bool = False


class Cards(Search[TextReward]):
    """`Search` segment by segment.

    Args:
        model, prompter, rewards, batch_size: as in `Search`.
        threshold: entropy in nats before whose token a segment ends.
        longest: tokens of a segment at most.
        tries: proposals of a segment; the best of them is kept if none is accepted.
        target: the bar at full length, in standard deviations of a reward.
        softness: ς.
    """

    def __init__(
        self, model: Any, prompter: Prompter, rewards: Mapping[str, TextReward], batch_size: int, threshold: float,
        longest: int, tries: int, target: float, softness: float,
    ) -> None:  # fmt: skip
        super().__init__(model, prompter, rewards, batch_size)
        self._threshold, self._longest, self._tries = threshold, longest, tries
        self._target, self._softness = target, softness

    def search(self, rows: list[Found]) -> None:
        """Propose, value, and keep or draw again, until all rows have ended."""
        # How many numbers a row draws is not known beforehand.
        streams = [random_generator(row.request.stream) for row in rows]
        tries = [0] * len(rows)
        best: list[tuple[float, _Segment] | None] = [None] * len(rows)
        for row in rows:
            row.kl = row.logp = math.nan
        while going := [place for place, row in enumerate(rows) if row.finish is None]:
            alive = [rows[place] for place in going]
            segments = self._propose(alive, [streams[place] for place in going])
            rewards = self._value(alive, segments)
            for place, row, segment, reward in zip(going, alive, segments, rewards, strict=True):
                length = len(row.tokens) + len(segment.tokens)
                row.forwards += (1 + len(row.request.arms)) * length  # every model reads the text again
                tries[place] += 1
                held = best[place]
                if held is None or reward > held[0]:
                    held = best[place] = (reward, segment)
                bar = self._target * sum(row.request.arms.values()) * length / row.request.max_new_tokens
                accepted = (
                    segment if streams[place].random() < math.exp(min(0.0, (reward - bar) / self._softness)) else None
                )
                if accepted is None and tries[place] >= self._tries:
                    accepted = held[1]
                if accepted is not None:
                    row.tokens += accepted.tokens
                    row.logp_base += accepted.logp
                    row.ended(self._ends)
                    tries[place], best[place] = 0, None

    def _propose(self, rows: list[Found], streams: list[np.random.Generator]) -> list[_Segment]:
        """One more segment of each row, sampled from the base."""
        segments, reading = [_Segment() for _ in rows], self._reading(self._model.base_model, rows)
        for step in range(self._longest):
            logps_BV = self._logps(reading.last_BD)
            unsure = (entropy(logps_BV) > self._threshold).tolist()
            uniforms_B = torch.tensor([stream.random() for stream in streams], dtype=torch.float64)
            tokens_B = draw(logps_BV, uniforms_B.to(logps_BV.device))
            logp = logps_BV.gather(1, tokens_B[:, None])[:, 0].tolist()
            for place, (row, segment) in enumerate(zip(rows, segments, strict=True)):
                segment.closed |= bool(step and unsure[place])
                if not segment.closed:
                    segment.tokens.append(token := int(tokens_B[place]))
                    segment.logp += logp[place]
                    full = len(row.tokens) + len(segment.tokens) >= row.request.max_new_tokens
                    segment.closed = full or token in self._ends
            if all(segment.closed for segment in segments):
                break
            reading.read(tokens_B[:, None])
        return segments

    def _value(self, rows: list[Found], segments: list[_Segment]) -> list[float]:
        """Σ_i w_i r_i of each row's text with its segment."""
        whole = [
            Found(row.request, row.prompt, [*row.tokens, *segment.tokens])
            for row, segment in zip(rows, segments, strict=True)
        ]
        total_B: Tensor = torch.zeros(len(rows), device=self._model.device)
        for name, weight_B in self._weights(rows).items():
            reward = self._rewards[name]
            total_B += weight_B * reward.of(self._reading(reward.backbone, whole).last_BD)
        values: list[float] = total_B.tolist()
        return values
