"""Transfer-Q (Chakraborty et al., NeurIPS 2024) on a small budget: a candidate is worth what a roll-out after it earns.

The base itself rolls out, greedily and for a few tokens, in the place of an aligned model to the end of the text.

Shapes: B rows, K candidates, N = B · K roll-outs, H their tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.generation.methods.args import Args
from pipeline.generation.methods.lookahead_cache import LookaheadCache, TextReward
from pipeline.models.prompting import Prompter


class TransferQ(Args):
    """`Args` whose candidates are valued after `horizon` more tokens; other arguments are those of `Args`."""

    def __init__(
        self, model: Any, prompter: Prompter, rewards: Mapping[str, TextReward], batch_size: int, top_k: int,
        strength: float, horizon: int,
    ) -> None:  # fmt: skip
        super().__init__(model, prompter, rewards, batch_size, top_k, strength)
        self._horizon = horizon
        self._rolled: tuple[Tensor, Tensor] | None = None  # candidates and their roll-outs, for all objectives

    def values(self, name: str, reading: LookaheadCache, base: LookaheadCache, candidates_BK: Tensor) -> Tensor:
        """The reward of the text with each candidate and its roll-out: reward_BK."""
        rolled_NH = self._roll_outs(base, candidates_BK)
        hidden_NHD = reading.forked(self._top_k).read(rolled_NH)
        ends = torch.tensor(sorted(self._ends), device=rolled_NH.device)
        ended_NH = torch.isin(rolled_NH, ends)
        last_N = torch.where(ended_NH.any(1), ended_NH.int().argmax(1), self._horizon)
        reward_NH = self._rewards[name].of(hidden_NHD)
        return reward_NH.gather(1, last_N[:, None]).view(candidates_BK.shape)

    def _roll_outs(self, base: LookaheadCache, candidates_BK: Tensor) -> Tensor:
        if self._rolled is None or self._rolled[0] is not candidates_BK:
            fork, tokens = base.forked(self._top_k), [candidates_BK.flatten()]
            for _ in range(self._horizon):
                fork.read(tokens[-1][:, None])
                tokens.append(self._logps(fork.last_BD).argmax(-1))
            self._rolled = candidates_BK, torch.stack(tokens, dim=1)
        return self._rolled[1]

    def forwards(self, objectives: int) -> int:
        """Positions computed for one token: roll-outs of the base, read by each reward model."""
        return 1 + self._top_k * self._horizon + objectives * (self._top_k * (self._horizon + 1) + 1)
