"""ARGS (Khanov et al., ICLR 2024): the base's likeliest next tokens, each valued by the reward of the text with it.

π(v) ∝ π_base(v) · exp(Σ_i w_i r_i(x, y, v)) over the top k; the stochastic variant, whose law and KL are exact.
Transfer-Q shares the loop and values a candidate by what may follow it.

Shapes: B rows, K candidates, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.generation.methods.lookahead_cache import LookaheadCache, TextReward
from pipeline.generation.methods.search import Found, Readings, TokenSearch, Weights
from pipeline.models.prompting import Prompter


class Args(TokenSearch[TextReward]):
    """`TokenSearch` among candidates.

    Args:
        model, prompter, rewards, batch_size: as in `Search`.
        top_k: candidates per token.
        strength: by what the weights are multiplied.
    """

    def __init__(
        self, model: Any, prompter: Prompter, rewards: Mapping[str, TextReward], batch_size: int, top_k: int,
        strength: float,
    ) -> None:  # fmt: skip
        super().__init__(model, prompter, rewards, batch_size)
        self._top_k, self._strength = top_k, strength

    def law(self, base_BV: Tensor, weights: Weights, base: LookaheadCache, readings: Readings) -> Tensor:
        """The base at its likeliest tokens, tilted by what each of them is worth."""
        values_BK, candidates_BK = base_BV.topk(self._top_k, dim=-1)
        for name, reading in readings.items():
            reward_BK = self.values(name, reading, base, candidates_BK)
            values_BK = values_BK + self._strength * weights[name][:, None] * reward_BK
        return torch.full_like(base_BV, -torch.inf).scatter_(1, candidates_BK, values_BK).log_softmax(-1)

    def readings(self, rows: Sequence[Found], weights: Mapping[str, Tensor]) -> dict[str, LookaheadCache]:
        """Every reward model reads the rows as the base does."""
        return {name: self._reading(self._rewards[name].backbone, rows) for name in weights}

    def values(self, name: str, reading: LookaheadCache, base: LookaheadCache, candidates_BK: Tensor) -> Tensor:
        """The reward of the text with each candidate: reward_BK."""
        return self._rewards[name].of(reading.tried(candidates_BK))

    def forwards(self, objectives: int) -> int:
        """Positions computed for one token: the base's, and per objective the candidates' and the chosen one's."""
        return 1 + objectives * (self._top_k + 1)
