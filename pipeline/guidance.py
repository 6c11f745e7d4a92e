"""The decoding rule of GenARM, as pure functions of logits.

Shapes: B rows (a prompt at a point), V vocabulary of the base's tokenizer.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 256  # tokens summed together by `draw`
_ALMOST_ONE = 1 - 2.0**-53  # keeps a uniform below 1 after rounding


def token_logps(logits_BV: Tensor, vocab_size: int) -> Tensor:
    """Cut logits to the tokenizer's vocabulary, then normalise: logps_BV in float32 (float64 stays).

    Cutting first matters: an embedding may be padded, or have grown by a pad token, and such entries take no mass.
    """
    logits = logits_BV[..., :vocab_size]
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def guided_logps(base_logps_BV: Tensor, arms: Iterable[tuple[Tensor, Tensor, Tensor]], temperature_B: Tensor) -> Tensor:
    """log π(y_t|·) = (log π_base + Σ_i α_i log π_r,i) / T − log Z (GenARM, guided decoding): logps_BV, normalised.

    `arms` holds, per ARM, the rows it guides, its α at those rows, and its logps there. The temperature divides the
    whole sum, once; nothing is normalised by 1 + Σα.
    """
    total_BV = base_logps_BV.clone()
    for rows_b, alpha_b, arm_logps_bV in arms:
        total_BV.index_add_(0, rows_b, alpha_b[:, None] * arm_logps_bV)
    return torch.log_softmax(total_BV.div_(temperature_B[:, None]), dim=-1)


def kl_divergence(logps_BV: Tensor, reference_logps_BV: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of each row's next-token law, in nats: kl_B."""
    return (logps_BV.exp() * (logps_BV - reference_logps_BV)).sum(-1)


def random_stream(key: str, length: int) -> np.ndarray:
    """The uniforms in [0, 1) that draw one row's tokens, fixed by a 32-digit hex key alone.

    Every row owns its stream, so what it draws depends neither on the rows around it nor on the device.
    """
    return np.random.Generator(np.random.Philox(key=int(key, 16))).random(length)


def draw(logps_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution at that row's uniform: tokens_B.

    In two levels, since a running sum over the whole vocabulary is the slow part: the chunk of the vocabulary where
    the uniform falls, then the token inside it. A token of probability 0 is never drawn.
    """
    probs_BV = logps_BV.exp()
    padded = F.pad(probs_BV, (0, -probs_BV.shape[-1] % _CHUNK))
    chunks_BNC = padded.view(len(padded), -1, _CHUNK)
    mass_BN = chunks_BNC.sum(-1).double()
    upper_BN = mass_BN.cumsum(-1)
    target_B1 = uniforms_B.to(upper_BN)[:, None] * upper_BN[:, -1:]
    chunk_B1 = torch.searchsorted(upper_BN, target_B1, right=True).clamp_max(mass_BN.shape[1] - 1)
    mass_B1 = mass_BN.gather(1, chunk_B1)
    inside_B1 = (target_B1 - (upper_BN.gather(1, chunk_B1) - mass_B1)) / mass_B1  # where in the chunk, in [0, 1)
    inner_BC = chunks_BNC[torch.arange(len(padded), device=padded.device), chunk_B1[:, 0]].double().cumsum(-1)
    token_B1 = torch.searchsorted(inner_BC, inside_B1.clamp(0, _ALMOST_ONE) * inner_BC[:, -1:], right=True)
    return (chunk_B1 * _CHUNK + token_B1)[:, 0]
