"""One causal LM and the LoRA adapters that share it: base and ARMs as contiguous row blocks of one forward.

A lane is one model seen by the decoder: the base itself or the base with one adapter. The rows of all lanes go
through the backbone together, so its weights are read once per step; each adapter's low-rank update is added on its
own block of rows. Shapes: P prompts, B rows, L block rows over all lanes, T time, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pipeline.config import UserError

BASE = "base"  # the lane without an adapter


@dataclass
class _LowRank:
    """One adapter's update of one linear layer, scaling folded in: x ↦ (x A) B."""

    a_DR: Tensor
    b_RO: Tensor


def read_adapter(folder: Path, model: PreTrainedModel) -> dict[str, _LowRank]:
    """The low-rank updates of a PEFT LoRA folder by the name of the linear layer they belong to.

    Raises:
        UserError: the folder is missing, damaged, not plain LoRA, or made for another base.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} holds no adapter: train it with `dvc repro train`.")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(weights)
    except Exception as error:
        raise UserError(f"{folder} could not be read ({error}): train it again with `dvc repro --force`.") from error
    if config.peft_type != "LORA" or config.use_dora or config.bias != "none" or config.modules_to_save:
        raise UserError(f"{folder} is no plain LoRA adapter: use one without DoRA, biases or saved modules.")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    updates: dict[str, _LowRank] = {}
    for key, tensor in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        other = tensors.get(key.replace(".lora_A.", ".lora_B."))
        layer = layers.get(name)
        if (
            layer is None
            or other is None
            or (tensor.shape[1], other.shape[0])
            != (
                layer.in_features,
                layer.out_features,
            )
        ):
            raise UserError(f"{folder}: its update of {name} does not fit the base: use an adapter trained on it.")
        rank = tensor.shape[0]
        scaling = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
        place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        updates[name] = _LowRank(tensor.T.to(**place), (other.T * scaling).to(**place).contiguous())
    if not updates:
        raise UserError(f"{folder} holds no LoRA weights: train it again with `dvc repro --force`.")
    return updates


class Lanes:
    """The lanes of one backbone, with their shared key-value cache.

    `prefill` starts a batch, `step` advances every row by one token, `keep` drops finished rows. One batch at a time.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Path]) -> None:
        self.model = model
        self._blocks: list[tuple[str, int, int]] = []  # lane, its first and last + 1 block row
        self._running: list[tuple[str, int, int]] = []  # the blocks while our own forward runs: the model may be shared
        updates = {name: read_adapter(folder, model) for name, folder in adapters.items()}
        for layer_name, layer in model.named_modules():
            here = {name: update[layer_name] for name, update in updates.items() if layer_name in update}
            if here:
                layer.register_forward_hook(self._adding(here))

    def _adding(self, updates: dict[str, _LowRank]) -> Any:
        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], output_LTO: Tensor) -> None:
            for name, first, last in self._running:
                update = updates.get(name)
                if update is not None:
                    output_LTO[first:last] += (inputs[0][first:last] @ update.a_DR) @ update.b_RO

        return hook

    def prefill(self, ids_PT: Tensor, mask_PT: Tensor, prompt_B: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Read left-padded prompts once per lane, then spread them over rows.

        Args:
            ids_PT: prompt tokens, padded on the left.
            mask_PT: 1 where `ids_PT` is a token.
            prompt_B: the prompt of each row.
            rows: per lane, the rows it serves (ascending); lanes without rows are left out.
        """
        self._rows = {lane: rows_b for lane, rows_b in rows.items() if len(rows_b)}
        wanted, spread, start, self._blocks = [], [], 0, []
        for lane, rows_b in self._rows.items():
            prompts, place = torch.unique(prompt_B[rows_b], return_inverse=True)
            wanted.append(prompts)
            spread.append(start + place)
            self._blocks.append((lane, start, start + len(prompts)))
            start += len(prompts)
        chosen, spread_L = torch.cat(wanted), torch.cat(spread)
        self._cache = DynamicCache(config=self.model.config)
        logits_LV = self._forward(ids_PT[chosen], mask_PT[chosen])
        self._cache.batch_select_indices(spread_L)
        self._mask_LT = mask_PT[chosen][spread_L]
        self._logits_LV = logits_LV[spread_L]
        self._set_blocks()

    def step(self, tokens_B: Tensor) -> None:
        """Append each row's token in every lane that serves the row."""
        tokens_L1 = torch.cat([tokens_B[rows_b] for rows_b in self._rows.values()])[:, None]
        self._mask_LT = torch.cat([self._mask_LT, self._mask_LT.new_ones(len(tokens_L1), 1)], dim=1)
        self._logits_LV = self._forward(tokens_L1, self._mask_LT)

    def logits(self, lane: str) -> Tensor:
        """The lane's next-token logits for the rows it serves, in their order: logits_bV."""
        first, last = next((first, last) for name, first, last in self._blocks if name == lane)
        return self._logits_LV[first:last]

    @property
    def rows(self) -> dict[str, Tensor]:
        """Per lane, the rows it serves."""
        return self._rows

    def keep(self, kept_k: Tensor, count: int) -> None:
        """Keep only the given rows of `count` (ascending) and number them anew from 0."""
        new_place = torch.full((count,), -1, device=kept_k.device)
        new_place[kept_k] = torch.arange(len(kept_k), device=kept_k.device)
        selected, rows = [], {}
        for lane, first, _last in self._blocks:
            place_b = new_place[self._rows[lane]]
            alive = (place_b >= 0).nonzero()[:, 0]
            selected.append(first + alive)
            if len(alive):
                rows[lane] = place_b[alive]
        selected_L = torch.cat(selected)
        self._rows = rows
        self._cache.batch_select_indices(selected_L)
        self._mask_LT = self._mask_LT[selected_L]
        self._logits_LV = self._logits_LV[selected_L]
        self._set_blocks()

    def _set_blocks(self) -> None:
        start, self._blocks = 0, []
        for lane, rows_b in self._rows.items():
            self._blocks.append((lane, start, start + len(rows_b)))
            start += len(rows_b)

    def _forward(self, ids_LT: Tensor, mask_LT: Tensor) -> Tensor:
        position_LT = (mask_LT.cumsum(-1) - 1).clamp_min(0)[:, -ids_LT.shape[1] :]
        self._running = self._blocks
        try:
            out = self.model(
                input_ids=ids_LT,
                attention_mask=mask_LT,
                position_ids=position_LT,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            self._running = []
        return out.logits[:, -1]
