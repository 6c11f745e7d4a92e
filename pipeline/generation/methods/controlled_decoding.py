"""Controlled decoding by prefix scorers: FUDGE (Yang & Klein, NAACL 2021) and CD (Mudgal et al., ICML 2024).

π(v) ∝ π_base(v) · exp(Σ_i w_i V_i(x, y, v)). V_i is the probability that a response which begins so is as objective i
prefers (CD's tilt by a value function; MAVIS, arXiv 2508.13415, mixes value models of several objectives alike), or its
logarithm (FUDGE: Bayes' rule at w_i = 1). A prefix scorer reads the base's own hidden state and values all next tokens
at once, so nothing but the base is computed.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pipeline.generation.methods.lookahead_cache import LookaheadCache
from pipeline.generation.methods.search import Readings, TokenSearch, Weights
from pipeline.models.prefix_scorer import PrefixValues
from pipeline.models.prompting import Prompter


class ControlledDecoding(TokenSearch[PrefixValues]):
    """`TokenSearch` over the whole vocabulary.

    Args:
        model, prompter, rewards, batch_size: as in `Search`.
        scale: by what the weights are multiplied.
        logarithm: the value is the logarithm of the probability.
    """

    def __init__(
        self, model: Any, prompter: Prompter, rewards: Mapping[str, PrefixValues], batch_size: int, scale: float,
        logarithm: bool,
    ) -> None:  # fmt: skip
        super().__init__(model, prompter, rewards, batch_size)
        self._scale, self._value = scale, F.logsigmoid if logarithm else Tensor.sigmoid

    def law(self, base_BV: Tensor, weights: Weights, base: LookaheadCache, readings: Readings) -> Tensor:
        """The base, tilted by the value of each token."""
        tilted_BV = base_BV
        for name, weight_B in weights.items():
            value_BV = self._value(self._rewards[name].of(base.last_BD)[:, : base_BV.shape[1]])
            tilted_BV = tilted_BV + self._scale * weight_B[:, None] * value_BV
        return tilted_BV.log_softmax(-1)
