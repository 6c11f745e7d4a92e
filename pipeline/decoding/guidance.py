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
_LOWEST = -1e30  # stands for log 0 where a probability of 0 multiplies it


def cut(logits_BV: Tensor, vocab_size: int) -> Tensor:
    """Logits over the tokenizer's vocabulary.

    Cutting comes before any normalising: an embedding may be padded, or have grown by a pad token, and such entries
    take no mass.
    """
    return logits_BV[..., :vocab_size]


def normalised(logits_BV: Tensor) -> Tensor:
    """Log-probabilities in float32, or float64 if the logits are: logps_BV."""
    return torch.log_softmax(logits_BV, dim=-1, dtype=torch.promote_types(logits_BV.dtype, torch.float32))


def guided_logps(
    base_BV: Tensor,
    arms: Iterable[tuple[Tensor, Tensor, Tensor]],
    temperature_B: Tensor,
    base_weight_B: Tensor | None = None,
) -> Tensor:
    """log π(y_t|·) = (w log π_base + Σ_i α_i log π_r,i) / T − log Z: logps_BV, normalised.

    With w = 1, which is what None means, GenARM's guided decoding. A model with α < 0 is divided by: α and −α on an
    ARM and on what it was made from are the log-ratio form (EFT, arXiv 2310.12962; proxy-tuning, arXiv 2401.08565), and
    w = 0 with one model at 1 is that model.

    `arms` holds, per ARM, the rows it guides, its α at those rows, and its values there. Cut logits serve as well as
    log-probabilities, for base and ARMs: what normalises each is one constant per row, and log Z takes it up. The
    temperature divides the whole sum, once; nothing is normalised by 1 + Σα. Sums are formed in the precision of
    `temperature_B` at least.
    """
    total_BV = base_BV / temperature_B[:, None]
    if base_weight_B is not None:
        total_BV *= base_weight_B[:, None]
    for rows_b, alpha_b, arm_bV in arms:
        scaled_bV = arm_bV * (alpha_b / temperature_B[rows_b])[:, None]
        total_BV.index_add_(0, rows_b, scaled_bV.to(total_BV.dtype))
    return torch.log_softmax(total_BV, dim=-1)


def truncate(logps_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor) -> Tensor:
    """Keep each row's likeliest tokens and normalise again: logps_BV, −inf at the others.

    In Hugging Face's order, each on what the one before left: the `top_k` likeliest tokens (0: all), the fewest whose
    mass reaches `top_p` (1: all), those at least `min_p` times as likely as the likeliest (0: all). One token always
    stays; of equally likely ones exactly `top_k` are kept.
    """
    vocab_size = logps_BV.shape[-1]
    widest = int(top_k_B.max()) if bool((top_k_B > 0).all()) else vocab_size
    sorted_BK, order_BK = logps_BV.topk(min(widest, vocab_size), dim=-1)
    rank_K = torch.arange(sorted_BK.shape[-1], device=logps_BV.device)
    kept_BK = rank_K < torch.where(top_k_B > 0, top_k_B, vocab_size)[:, None]
    probs_BK = sorted_BK.double().exp() * kept_BK
    likelier_BK = (probs_BK.cumsum(-1) - probs_BK) / probs_BK.sum(-1, keepdim=True)  # mass of the tokens before
    kept_BK &= (likelier_BK < top_p_B[:, None]) | (top_p_B >= 1)[:, None]
    kept_BK &= sorted_BK >= sorted_BK[:, :1] + min_p_B.log().to(sorted_BK)[:, None]
    kept_BK[:, 0] = True
    kept_BV = torch.zeros_like(logps_BV, dtype=torch.bool).scatter_(1, order_BK, kept_BK)
    return torch.log_softmax(logps_BV.masked_fill(~kept_BV, -torch.inf), dim=-1)


def kl_divergence(logps_BV: Tensor, reference_logps_BV: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of each row's next-token law, in nats: kl_B. A token that π never draws adds nothing."""
    return torch.linalg.vecdot(logps_BV.exp(), (logps_BV - reference_logps_BV).clamp_min_(_LOWEST))


def entropy(logits_BV: Tensor) -> Tensor:
    """Entropy of each row's next-token law, in nats: entropy_B."""
    logps_BV = normalised(logits_BV)
    return -torch.linalg.vecdot(logps_BV.exp(), logps_BV.clamp_min(_LOWEST))


def random_generator(key: str) -> np.random.Generator:
    """What draws one row, fixed by a 32-digit hex key alone.

    Every row owns its stream, so what it draws depends neither on the rows around it nor on the device.
    """
    return np.random.Generator(np.random.Philox(key=int(key, 16)))


def random_stream(key: str, length: int) -> np.ndarray:
    """The uniforms in [0, 1) that draw one row's tokens: the first of its `random_generator`."""
    return random_generator(key).random(length)


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
    # Only a law that is not a number points beyond the vocabulary; callers check for that themselves.
    return (chunk_B1 * _CHUNK + token_B1)[:, 0].clamp_max(logps_BV.shape[-1] - 1)


# Of the decoding rule: raise it when the same request would give another row. A test compares rows with committed ones.
LAW_VERSION = 3
