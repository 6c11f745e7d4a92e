"""Rows read by one model ahead of what is chosen: tokens are appended, tried without being kept, or forked.

Shapes: B rows, K candidates, N new tokens, T positions, D features.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pipeline.models.loading import Source, resolve_dtype
from pipeline.models.prompting import left_pad
from pipeline.models.reward_model import merged_classifier, reward_scale


class LookaheadCache:
    """The key-value cache of B rows, whose prompts are padded on the left to one length.

    Args:
        backbone: a decoder of transformers without its head.
        prompts: token ids.
        pad: the padding token.
    """

    def __init__(self, backbone: Any, prompts: Sequence[Sequence[int]], pad: int) -> None:
        self._backbone, self._cache = backbone, DynamicCache(config=backbone.config)
        ids_BT, mask_BT = left_pad(prompts, pad, backbone.device)
        self._mask_BT = mask_BT.bool()
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
        self.last_BD = self._forward(ids_BT, mask_BT, positions_BT)[:, -1]
        self._length_B1 = mask_BT.sum(-1, keepdim=True)

    def read(self, tokens_BN: Tensor) -> Tensor:
        """Append tokens: hidden_BND; `last_BD` is that of the last one."""
        new = tokens_BN.shape[1]
        self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(tokens_BN), new)], dim=1)
        positions_BN = self._length_B1 + torch.arange(new, device=tokens_BN.device)
        hidden_BND = self._forward(tokens_BN, self._mask_BT.long(), positions_BN)
        self._length_B1 = self._length_B1 + new
        self.last_BD = hidden_BND[:, -1]
        return hidden_BND

    def tried(self, tokens_BK: Tensor) -> Tensor:
        """Each of K tokens as if it came next, none of them kept: hidden_BKD."""
        rows, tries = tokens_BK.shape
        held = self._mask_BT.shape[1]
        own_BKK = torch.eye(tries, dtype=torch.bool, device=tokens_BK.device).expand(rows, tries, tries)
        seen_BKT = torch.cat([self._mask_BT[:, None].expand(rows, tries, held), own_BKK], dim=2)
        dtype = self._backbone.dtype
        mask_B1KT = torch.zeros_like(seen_BKT, dtype=dtype).masked_fill_(~seen_BKT, torch.finfo(dtype).min)[:, None]
        hidden_BKD = self._forward(tokens_BK, mask_B1KT, self._length_B1.expand(rows, tries))
        self._cache.crop(-tries)
        return hidden_BKD

    def forked(self, times: int) -> "LookaheadCache":
        """A copy in which every row stands so many times, one after the other."""
        fork = copy.copy(self)
        fork._cache = copy.deepcopy(self._cache)
        fork._cache.batch_repeat_interleave(times)
        fork._mask_BT, fork._length_B1, fork.last_BD = (
            held.repeat_interleave(times, dim=0) for held in (self._mask_BT, self._length_B1, self.last_BD)
        )
        return fork

    def _forward(self, ids_BN: Tensor, mask: Tensor, positions_BN: Tensor) -> Tensor:
        hidden_BND: Tensor = self._backbone(
            input_ids=ids_BN,
            attention_mask=mask,
            position_ids=positions_BN,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return hidden_BND


@dataclass(frozen=True)
class TextReward:
    """A trained reward model as searches use it: standardised, so that those of several objectives can be weighed."""

    backbone: Any
    score: nn.Linear
    mean: float
    std: float

    @classmethod
    def load(cls, base: Source, folder: Path, device: torch.device) -> "TextReward":
        """The adapter of a folder on its base, merged into it."""
        scale = reward_scale(folder)
        merged = merged_classifier(folder, base.folder)
        merged = merged.to(device=device, dtype=resolve_dtype(base.dtype, device)).eval().requires_grad_(False)
        return cls(merged.base_model, merged.score, *scale)

    def of(self, hidden: Tensor) -> Tensor:
        """Standardised rewards at hidden states [..., D]: rewards [...]."""
        raw = self.score(hidden)[..., 0].float()
        return (raw - self.mean) / self.std
