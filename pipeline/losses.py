"""Losses and rewards as pure functions of tensors.

Shapes: B pairs, N response tokens, S responses, D features, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.guidance import normalised

_CHUNK = 256  # tokens whose logits are held at once


def token_logps(hidden_ND: Tensor, head_VD: Tensor, label_N: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """log softmax(h Wᵀ + b)[label] per token: token_logps_N in float32 (float64 stays).

    Logits are held for a few hundred tokens at a time, and never for the backward pass. Under a frozen head the
    derivative of a token's log-probability with respect to its hidden state, W[label] − Σ_v p(v) W[v], is formed while
    they are at hand; under one that learns they are computed again.
    """
    frozen = not (head_VD.requires_grad or (bias_V is not None and bias_V.requires_grad))
    chunk = _FrozenHead.apply if frozen else partial(checkpoint, _plain, use_reentrant=False)
    parts = [
        chunk(hidden_ND[start : start + _CHUNK], head_VD, label_N[start : start + _CHUNK], bias_V)
        for start in range(0, len(hidden_ND), _CHUNK)
    ]
    return torch.cat(parts)


def _plain(hidden_ND: Tensor, head_VD: Tensor, label_N: Tensor, bias_V: Tensor | None) -> Tensor:
    return normalised(F.linear(hidden_ND, head_VD, bias_V)).gather(1, label_N[:, None])[:, 0]


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, label_N: Tensor, bias_V: Tensor | None) -> Tensor:
        logps_NV = normalised(F.linear(hidden_ND, head_VD, bias_V))
        logps_N = logps_NV.gather(1, label_N[:, None])[:, 0]
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(head_VD[label_N] - logps_NV.exp_().to(head_VD.dtype) @ head_VD)
        return logps_N

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, None, None, None]:
        (slope_ND,) = ctx.saved_tensors
        return (slope_ND * upstream_N[:, None]).to(slope_ND.dtype), None, None, None


def response_logps(token_logps_N: Tensor, response_N: Tensor) -> Tensor:
    """log π(y|x) per response, summed (not averaged) over its tokens: logps_S. Token n is of `response_N[n]`."""
    return token_logps_N.new_zeros(int(response_N.max()) + 1).index_add(0, response_N, token_logps_N)


def arm_loss(chosen_logps_B: Tensor, rejected_logps_B: Tensor, beta: float) -> Tensor:
    """−log σ(β_r · [log π_r(y_w|x) − log π_r(y_l|x)]) per pair: loss_B (GenARM, ARM training objective)."""
    return -F.logsigmoid(beta * (chosen_logps_B - rejected_logps_B))


def reward_metrics(chosen_logps_B: Tensor, rejected_logps_B: Tensor, beta: float) -> dict[str, Tensor]:
    """Scalars under TRL's names; a reward is β_r · log π_r(y|x), as in its reference-free trainers."""
    chosen, rejected = beta * chosen_logps_B.detach(), beta * rejected_logps_B.detach()
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "logps/chosen": chosen_logps_B.detach().mean(),
        "logps/rejected": rejected_logps_B.detach().mean(),
    }


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
