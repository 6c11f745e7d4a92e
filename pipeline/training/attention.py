"""Attention over training rows, in which a prompt is followed by several responses.

Shapes: B rows, H query heads, K key heads, T positions, E features of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

RECOMPUTED = "recomputed"  # the name under which transformers finds `recomputed_attention`


def attention_mask(segments_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, T, T]: a token sees the prompt and its own response up to itself."""
    earlier_TT = torch.ones(2 * segments_BT.shape[1:], dtype=torch.bool, device=segments_BT.device).tril()
    key_B1T, query_BT1 = segments_BT[:, None, :], segments_BT[:, :, None]
    visible = earlier_TT & ((key_B1T == 0) | (key_B1T == query_BT1))
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def recomputed_attention(
    module: Any, query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor, attention_mask: Tensor, scaling: float,
    dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Softmax attention whose T × T probabilities are not kept for the backward pass but computed again: [B, T, H, E].

    For CPUs: torch's fused kernel, which does the same, is about twice as slow backwards there.
    """
    states = query_BHTE, key_BKTE, value_BKTE, attention_mask
    summed: Tensor = checkpoint(_attend, *states, scaling, dropout, use_reentrant=False, preserve_rng_state=dropout > 0)
    return summed, None


def _attend(
    query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor, mask_B1TT: Tensor, scaling: float, dropout: float
) -> Tensor:
    rows, heads, length, size = query_BHTE.shape
    keys = key_BKTE.shape[1]
    # The query heads that share a key head are queries of one product: nothing is repeated.
    scores = query_BHTE.reshape(rows, keys, -1, size) @ key_BKTE.transpose(-1, -2)
    scores_BHTT = torch.add(mask_B1TT, scores.view(rows, heads, length, length), alpha=scaling)
    weights_BHTT = F.dropout(scores_BHTT.softmax(-1).to(value_BKTE.dtype), dropout)
    summed = weights_BHTT.view(rows, keys, -1, length) @ value_BKTE
    return summed.view(rows, heads, length, size).transpose(1, 2).contiguous()


AttentionInterface.register(RECOMPUTED, recomputed_attention)
