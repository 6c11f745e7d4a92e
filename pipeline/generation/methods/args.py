"""ARGS (Khanov et al., ICLR 2024): the base's likeliest next tokens, each valued by the reward of the text with it.

π(v) ∝ π_base(v) · exp(Σ_i w_i r_i(x, y, v)) over the top k; the stochastic variant, whose law and KL are exact.
Transfer-Q shares the loop and values a candidate by what may follow it.

Shapes: B rows, K candidates, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.decoding.guidance import draw, kl_divergence
from pipeline.generation.methods.lookahead_cache import LookaheadCache, TextReward
from pipeline.generation.methods.search import Found, Search
from pipeline.models.prompting import Prompter


class Args(Search):
    """`Search` token by token.

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

    def search(self, rows: list[Found]) -> None:
        """Draw token by token; rows that have ended are computed on, and nothing of that is kept."""
        weights, uniforms_BT = self._weights(rows), self._uniforms(rows)
        base = self._reading(self._model.base_model, rows)
        readings = {name: self._reading(self._rewards[name].backbone, rows) for name in weights}
        for step in range(uniforms_BT.shape[1]):
            base_BV = self._logps(base.last_BD)
            values_BK, candidates_BK = base_BV.topk(self._top_k, dim=-1)
            for name, reading in readings.items():
                reward_BK = self.values(name, reading, base, candidates_BK)
                values_BK = values_BK + self._strength * weights[name][:, None] * reward_BK
            law_BV = torch.full_like(base_BV, -torch.inf).scatter_(1, candidates_BK, values_BK).log_softmax(-1)
            tokens_B = draw(law_BV, uniforms_BT[:, step])
            drawn_B1 = tokens_B[:, None]
            sums = [law_BV.gather(1, drawn_B1)[:, 0], base_BV.gather(1, drawn_B1)[:, 0], kl_divergence(law_BV, base_BV)]
            self._add(rows, tokens_B, torch.stack(sums, dim=1))
            if all(row.ended(self._ends) for row in rows):
                return
            for reading in (base, *readings.values()):
                reading.read(drawn_B1)

    def values(self, name: str, reading: LookaheadCache, base: LookaheadCache, candidates_BK: Tensor) -> Tensor:
        """The reward of the text with each candidate: reward_BK."""
        return self._rewards[name].of(reading.tried(candidates_BK))

    def forwards(self, objectives: int) -> int:
        """Positions computed for one token: the base's, and per objective the candidates' and the chosen one's."""
        return 1 + objectives * (self._top_k + 1)

    def _add(self, rows: list[Found], tokens_B: Tensor, sums_B3: Tensor) -> None:
        for row, token, (logp, logp_base, kl) in zip(rows, tokens_B.tolist(), sums_B3.tolist(), strict=True):
            if row.finish is None:
                row.tokens.append(token)
                row.logp, row.logp_base, row.kl = row.logp + logp, row.logp_base + logp_base, row.kl + kl
                row.forwards += self.forwards(len(row.request.arms))  # its own, whatever the rows beside it ask for
