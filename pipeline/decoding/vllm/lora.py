"""LoRA for vLLM on CPUs, in the place of the class that its CPU platform names (see `platform`).

The stock class gathers a copy of both adapter matrices for every row of every layer, which costs several times the
layer itself, and lets rows without an adapter read the last slot. Here all rows go through all adapters in one low-rank
product, a mask keeps what is each row's own, and a second product adds it: nothing is gathered, whatever the order of
the rows. That suits few adapters, and a guided request has few. Layers that no adapter changes are left alone.

Shapes: B rows, D in, L adapters, R rank, S slices of a layer's output, O their widths together.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class LaneLora(PunicaWrapperCPU):
    """y += scale · (mask ∘ (x Aᵀ)) Bᵀ over all adapters at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loaded: list[int | None] = []
        self._products: dict[int, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None] = {}
        self._masks: dict[tuple[Any, ...], Tensor | None] = {}

    def update_metadata(self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any) -> None:
        """Forget which rows are whose, and what was made of the matrices when adapters come or go."""
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        self._masks.clear()
        if lora_index_to_id != self._loaded:
            self._loaded = list(lora_index_to_id)
            self._products.clear()

    def add_lora_linear(
        self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], lora_b_stacked: tuple[Tensor, ...],
        scale: float, output_slices: tuple[int, ...], *, buffer: tuple[Tensor, ...] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Add each row's adapter to a layer's output."""
        self._add(y, x, lora_a_stacked, lora_b_stacked, scale, "token")

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, *,
        buffer: Tensor | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Add each row's adapter to the logits."""
        self._add(y, x, (lora_a_stacked,), (lora_b_stacked,), scale, "sampler")

    def _add(
        self, y: Tensor, x: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...], scale: float, rows: str
    ) -> None:  # fmt: skip
        mask = self._mask(rows, len(a), a[0].shape[-2], x.dtype)
        if mask is None:
            return
        key = a[0].data_ptr()
        if key not in self._products:
            self._products[key] = self._made(a, b)
        products = self._products[key]
        if products is None:
            return
        down, up = products
        added = up(down(x.view(-1, x.shape[-1])).mul_(mask))
        y.view(-1, y.shape[-1])[:, : added.shape[-1]].add_(added, alpha=scale)

    def _mask(self, rows: str, slices: int, rank: int, dtype: torch.dtype) -> Tensor | None:
        """1 where a low-rank column is of the row's own adapter, (B, S·L·R); None where no row has one."""
        key = (rows, slices, rank, dtype)
        if key not in self._masks:
            indices_B = self.token_lora_indices if rows == "token" else self.sampler_indices
            own_BL = indices_B[:, None] == torch.tensor(self._slots)
            wide = own_BL.repeat_interleave(rank, dim=1).repeat(1, slices)
            self._masks[key] = wide.to(dtype) if bool(own_BL.any()) else None
        return self._masks[key]

    def _made(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Any:
        """The products with A of all slices and adapters, (S·L·R, D), and with B, a block per slice, (O, S·L·R)."""
        if not any(bool(slots[self._slots].any()) for slots in b):
            return None
        below = torch.cat([slots[self._slots, 0].flatten(0, 1) for slots in a])
        above = torch.block_diag(*(slots[self._slots, 0].transpose(1, 2).flatten(0, 1) for slots in b)).T
        return _product(below), _product(above.contiguous())

    @property
    def _slots(self) -> list[int]:
        return [slot for slot, adapter in enumerate(self._loaded) if adapter is not None]


def _product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """X ↦ X Wᵀ by the kernel that vLLM takes for its own layers: it packs W once, where torch packs it every time."""
    if not ops._supports_onednn:
        return lambda x: x @ weight.T
    handler = ops.create_onednn_mm(weight.t(), 32)
    return lambda x: ops.onednn_mm(handler, x, None)
