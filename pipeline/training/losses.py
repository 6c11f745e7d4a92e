"""Losses and rewards as pure functions of tensors.

Shapes: B pairs, N response tokens, S responses, D features, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from pipeline.config.schema import Loss
from pipeline.decoding.guidance import normalised

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
            slope_ND = head_VD[label_N] - logps_NV.exp_().to(head_VD.dtype) @ head_VD
            ctx.save_for_backward(slope_ND.to(hidden_ND.dtype))
        return logps_N

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, None, None, None]:
        (slope_ND,) = ctx.saved_tensors
        return (slope_ND * upstream_N[:, None]).to(slope_ND.dtype), None, None, None


def distillation(
    child_ND: Tensor, parent_ND: Tensor, head_VD: Tensor, label_N: Tensor, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """KL(π_parent ‖ π_child) per token and the child's log π(label), both through one frozen head: kl_N, token_logps_N.

    Only the KL has a gradient, with respect to the child's hidden states (word-level distillation, Hinton et al.
    2015): (π_child − π_parent) W.
    """
    chunks = zip(*(states.split(_CHUNK) for states in (child_ND, parent_ND, label_N)), strict=True)
    parts = [_Distilled.apply(*chunk, head_VD, bias_V) for chunk in chunks]
    kl, logps = zip(*parts, strict=True)
    return torch.cat(kl), torch.cat(logps)


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, child_ND: Tensor, parent_ND: Tensor, label_N: Tensor, head_VD: Tensor, bias_V: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        own_NV, target_NV = (
            normalised(F.linear(states.to(head_VD), head_VD, bias_V)) for states in (child_ND, parent_ND)
        )
        logps_N = own_NV.gather(1, label_N[:, None])[:, 0]
        probs_NV = target_NV.exp()
        kl_N = torch.linalg.vecdot(probs_NV, target_NV.sub_(own_NV))
        if ctx.needs_input_grad[0]:
            slope_ND = own_NV.exp_().sub_(probs_NV).to(head_VD.dtype) @ head_VD
            ctx.save_for_backward(slope_ND.to(child_ND.dtype))
        ctx.mark_non_differentiable(logps_N)
        return kl_N, logps_N

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (slope_ND,) = ctx.saved_tensors
        return (slope_ND * upstream_N[:, None]).to(slope_ND.dtype), None, None, None, None


def response_logps(token_logps_N: Tensor, response_N: Tensor) -> Tensor:
    """log π(y|x) per response, summed (not averaged) over its tokens: logps_S. Token n is of `response_N[n]`."""
    return token_logps_N.new_zeros(int(response_N.max()) + 1).index_add(0, response_N, token_logps_N)


def length_normalised(logps_S: Tensor, response_N: Tensor) -> Tensor:
    """log π(y|x) / |y| per response (SimPO, arXiv 2405.14734, equation 3); |y| counts its tokens in `response_N`."""
    return logps_S / torch.bincount(response_N, minlength=len(logps_S))


def arm_loss(
    chosen_B: Tensor, rejected_B: Tensor, beta: Tensor | float, margin: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """−log σ(β_r · [log π_r(y_w|x) − log π_r(y_l|x)]) per pair: loss_B (GenARM, ARM training objective).

    Args:
        chosen_B, rejected_B: summed log-probabilities. Averaged ones make this the loss of SimPO (with `margin` γ),
            log-ratios to a reference that of DPO (arXiv 2305.18290, equation 7).
        beta: β_r, of all pairs or of each.
        margin: γ in −log σ(β_r · Δ − γ).
        label_smoothing: ε in −(1 − ε) · log σ(z) − ε · log σ(−z), z = β_r · Δ − γ (conservative DPO).
    """
    logits_B = beta * (chosen_B - rejected_B) - margin
    return -(1 - label_smoothing) * F.logsigmoid(logits_B) - label_smoothing * F.logsigmoid(-logits_B)


def hinge_loss(chosen_B: Tensor, rejected_B: Tensor, beta: Tensor | float, margin: float = 0.0) -> Tensor:
    """max(0, 1 − (β · [chosen − rejected] − γ)) per pair: loss_B (SLiC, arXiv 2305.10425)."""
    return torch.relu(1 + margin - beta * (chosen_B - rejected_B))


def implicit_rewards(loss: Loss, logps_S: Tensor, response_N: Tensor, reference_S: Tensor | None) -> Tensor:
    """What a loss compares, before β: reward_S.

    The sum log π_r(y|x); its mean over tokens (simpo); its difference from the reference's `reference_S` (dpo).
    """
    if loss.kind == "simpo":
        return length_normalised(logps_S, response_N)
    if loss.kind == "dpo":
        assert reference_S is not None
        return logps_S - reference_S
    return logps_S


def preference_loss(loss: Loss, chosen_B: Tensor, rejected_B: Tensor, beta: Tensor | float) -> Tensor:
    """The configured loss of implicit rewards: loss_B."""
    if loss.kind == "hinge":
        return hinge_loss(chosen_B, rejected_B, beta, loss.margin)
    return arm_loss(chosen_B, rejected_B, beta, loss.margin, loss.label_smoothing)


def reward_metrics(chosen_B: Tensor, rejected_B: Tensor, beta: Tensor | float) -> dict[str, Tensor]:
    """Values per pair [B] under TRL's names; a reward is β times the implicit reward, as in its trainers."""
    chosen, rejected = beta * chosen_B.detach(), beta * rejected_B.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen),
    }


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity; the device is waited for once, whatever their number."""
    finite = [torch.isfinite(tensor).all() for tensor in tensors]
    whole = [flag.full_tensor() if isinstance(flag, DTensor) else flag for flag in finite]
    return not whole or bool(torch.stack(whole).all())
