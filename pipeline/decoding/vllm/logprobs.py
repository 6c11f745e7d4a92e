"""Log-probabilities of one drawn token: of the guided law, and of each model that had a say.

The law is the guided one at the request's temperature (at 1 where it is greedy), penalties and format included, before
top-k, top-p and min-p. Each model's is its own at temperature 1.
"""

import math
from collections.abc import Mapping
from typing import TypedDict

from torch import Tensor

from pipeline.decoding.guidance import normalised


class TokenLogprobs(TypedDict):
    """In nats; plain values, since they travel between processes."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens, likeliest first, without those that cannot be drawn
    models: dict[str, float]  # of the token under the base, the ARMs


def token_logprobs(law_V: Tensor, token: int, size: int, models: Mapping[str, Tensor]) -> TokenLogprobs:
    """What is known of a token that was drawn.

    Args:
        law_V: log-probabilities of the guided law.
        token: the one that was drawn.
        size: how many of the likeliest tokens are listed.
        models: logits of each model.
    """
    logps_K, ids_K = law_V.topk(min(size, len(law_V)))
    return {
        "token": token,
        "logprob": float(law_V[token]),
        "top": [(one, logp) for one, logp in zip(ids_K.tolist(), logps_K.tolist(), strict=True) if logp > -math.inf],
        "models": {name: float(normalised(logits_V)[token]) for name, logits_V in models.items()},
    }
