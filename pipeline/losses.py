"""Losses and rewards as pure functions of tensors.

Shapes: B pairs or rows, K kept positions, N response tokens, S responses, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def response_logps(logits_BKV: Tensor, row_N: Tensor, column_N: Tensor, label_N: Tensor, response_N: Tensor) -> Tensor:
    """log π(y|x) per response, summed (not averaged) over its tokens: logps_S in float32 (float64 stays).

    Token n is `label_N[n]` of response `response_N[n]`, predicted by `logits_BKV[row_N[n], column_N[n]]`. Several
    tokens may share a column: the last token of a prompt predicts the first token of each of its responses.
    """
    logits_BKV = logits_BKV if logits_BKV.dtype == torch.float64 else logits_BKV.float()
    log_z_BK = torch.logsumexp(logits_BKV, dim=-1)
    token_logps_N = logits_BKV[row_N, column_N, label_N] - log_z_BK[row_N, column_N]
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
