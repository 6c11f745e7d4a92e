"""LoRA for vLLM on CPUs, in the place of the class that its CPU platform names (see `platform`).

The stock class gathers a copy of both adapter matrices for every row of every layer, which costs several times the
layer itself, and lets rows without an adapter read the last slot. Here all rows go through all adapters in one low-rank
product, a mask keeps what is each row's own, and a second product adds it: nothing is gathered, whatever the order of
the rows. That suits few adapters, and a guided request has few.

Shapes: B rows, D in, L adapter slots, R rank, S slices of a layer's output, O their widths.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class LaneLora(PunicaWrapperCPU):
    """y += scale · (mask ∘ (x Aᵀ)) Bᵀ over all adapters at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loaded: Sequence[int | None] = ()
        self._stacked: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._mask_BL: Tensor | None = None

    def update_metadata(self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any) -> None:
        """Note which rows are whose; forget what was made of the matrices when adapters come or go."""
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        if tuple(lora_index_to_id) != self._loaded:
            self._loaded = tuple(lora_index_to_id)
            self._stacked.clear()
        indices_B = self.token_lora_indices
        used = bool((indices_B >= 0).any())
        self._mask_BL = indices_B[:, None] == torch.arange(len(lora_index_to_id)) if used else None

    def _matrices(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """A of all slices and adapters on top of each other, (S·L·R, D), and per slice Bᵀ of all adapters, (L·R, O)."""
        key = a[0].data_ptr()
        if key not in self._stacked:
            below = torch.cat([slots[:, 0].flatten(0, 1) for slots in a])
            above = [slots[:, 0].transpose(1, 2).flatten(0, 1).contiguous() for slots in b]
            self._stacked[key] = below, above
        return self._stacked[key]

    def add_lora_linear(
        self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], lora_b_stacked: tuple[Tensor, ...],
        scale: float, output_slices: tuple[int, ...], *, buffer: tuple[Tensor, ...] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Add each row's adapter to a layer's output."""
        if self._mask_BL is None:
            return
        below, above = self._matrices(lora_a_stacked, lora_b_stacked)
        flat_BO, slots = y.view(-1, y.shape[-1]), self._mask_BL.shape[1]
        low = x.view(-1, x.shape[-1]) @ below.T
        rows, slices = low.shape[0], len(output_slices)
        low = low.view(rows, slices, slots, -1) * (self._mask_BL[:rows, None, :, None] * scale).to(low.dtype)
        start = 0
        for place, width in enumerate(output_slices):
            flat_BO[:, start : start + width] += low[:, place].flatten(1) @ above[place]
            start += width
