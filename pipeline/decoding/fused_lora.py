"""LoRA adapters that share one backbone: each adds its low-rank update on its own block of rows of one forward.

A lane may be a mixture of adapters (`pipeline.models.mixtures`), whose updates are added at its shares of them.

Shapes: L block rows (all lanes), S slots, T time, D input and O output features, R ranks of all adapters at work, A
adapters.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.config.errors import UserError
from pipeline.decoding.cuda_graphs import fused, side_by_side
from pipeline.models.mixtures import shares_of

_UNKNOWN = (  # what PEFT's LoRA can also do and `read_adapter` does not
    "use_dora", "modules_to_save", "alpha_pattern", "trainable_token_indices", "alora_invocation_tokens",
    "layer_replication", "target_parameters", "use_bdlora", "use_qalora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
_FEW = 16  # rows
Block = tuple[str, int, int]  # a lane, its first block row, its last + 1


@dataclass
class LowRank:
    """One adapter's update of one linear layer, scaling folded in: x ↦ (x A + c) B.

    A bias of B (PEFT's `lora_bias`) is a rank of its own, whose A is 0 and whose c is 1.
    """

    a_DR: Tensor
    b_RO: Tensor
    constant_R: Tensor | None = None  # None: no rank is a bias

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The same in another precision."""
        constant_R = None if self.constant_R is None else self.constant_R.to(dtype)
        return LowRank(self.a_DR.to(dtype), self.b_RO.to(dtype), constant_R)


def _ranks_side_by_side(updates: Sequence[LowRank]) -> LowRank:
    """The ranks of several updates of the same layers."""
    a_DR = torch.cat([update.a_DR for update in updates], dim=1)
    b_RO = torch.cat([update.b_RO for update in updates])
    return LowRank(a_DR, b_RO, _constants(updates))


def _constants(updates: Sequence[LowRank]) -> Tensor | None:
    if all(update.constant_R is None for update in updates):
        return None
    parts = [
        update.a_DR.new_zeros(update.a_DR.shape[1]) if update.constant_R is None else update.constant_R
        for update in updates
    ]
    return torch.cat(parts)


def read_adapter(folder: Path, model: PreTrainedModel) -> dict[str, LowRank]:
    """The low-rank updates of a PEFT LoRA folder by the name of the linear layer they belong to.

    Raises:
        UserError: the folder is missing, damaged, not plain LoRA, made for another base, or holds a number that is
            not finite.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} holds no adapter: train it with `dvc repro train`.")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(weights)
    except Exception as error:
        raise UserError(f"{folder} could not be read ({error}): train it again with `dvc repro --force`.") from error
    if config.peft_type != "LORA" or config.bias != "none" or any(getattr(config, name, None) for name in _UNKNOWN):
        raise UserError(f"{folder} is no plain LoRA adapter: use one without DoRA, biases, saved modules and variants.")
    if config.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
        raise UserError(f"{folder} changes its base ({config.init_lora_weights}): convert it to a plain LoRA adapter.")
    layers = dict(model.named_modules())
    updates: dict[str, LowRank] = {}
    for key, a_RD in tensors.items():
        if not key.endswith(".lora_A.weight"):
            if not key.endswith((".lora_B.weight", ".lora_B.bias") if config.lora_bias else ".lora_B.weight"):
                raise UserError(f"{folder} holds {key}, which is no plain LoRA weight: use a plain LoRA adapter.")
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b_OR = tensors.get(key.replace(".lora_A.", ".lora_B."))
        bias_O = tensors.get(key.replace(".lora_A.weight", ".lora_B.bias")) if config.lora_bias else None
        layer = layers.get(name)
        if layer is None or b_OR is None or (a_RD.shape[1], b_OR.shape[0]) != _sizes(layer):
            raise UserError(f"{folder}: its update of {name} does not fit the base: use an adapter trained on it.")
        if not all(tensor.isfinite().all() for tensor in (a_RD, b_OR, bias_O) if tensor is not None):
            raise UserError(f"{folder}: its update of {name} is not finite: train it again with `dvc repro --force`.")
        rank = a_RD.shape[0]
        scaling = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
        precise = torch.promote_types(model.dtype, torch.float32)  # in which PEFT keeps adapters too
        place: dict[str, Any] = {"device": _device(layer), "dtype": precise}
        update = LowRank(a_RD.T.to(**place).contiguous(), (b_OR.T * scaling).to(**place).contiguous())
        if bias_O is not None:
            bias_1O = (bias_O * scaling).to(**place)[None]
            bias = LowRank(update.a_DR.new_zeros(len(update.a_DR), 1), bias_1O, bias_1O.new_ones(1))
            update = _ranks_side_by_side([update, bias])
        updates[name] = update
    if not updates:
        raise UserError(f"{folder} holds no LoRA weights: train it again with `dvc repro --force`.")
    return updates


def _sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Features that a linear layer takes and gives; None of another layer. GPT-2's `Conv1D` is one by another name."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return None if None in sizes else (int(sizes[0]), int(sizes[1]))  # type: ignore[arg-type]


def _device(layer: nn.Module) -> torch.device:
    """Where a layer is; one that is packed (GPTQ, AWQ) has buffers and no parameters."""
    return next(chain(layer.parameters(), layer.buffers())).device


class AdaptedModel:
    """A twin of a model that shares its weights and adds, row block by row block, the updates of many adapters.

    Linear layers that are fed the same tensor (q, k and v; gate and up) become one product: their weights are laid
    side by side once, and the model's own parameters become views of that. The original keeps its behaviour; its
    twin is `model`.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Mapping[str, LowRank]]) -> None:
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        self.model: PreTrainedModel = copy.deepcopy(model, shared)
        self.lanes = list(adapters)
        names = {layer: name for name, layer in self.model.named_modules()}
        self._groups: list[_Group] = []
        self._served: tuple[tuple[Block, ...], bool] | None = None
        for layers in _fed_alike(self.model, set(chain.from_iterable(adapters.values()))):
            updates = {
                lane: [by_name.get(names[layer]) for layer in layers]
                for lane, by_name in adapters.items()
                if any(names[layer] in by_name for layer in layers)
            }
            if updates or len(layers) > 1:
                self._groups.append(_Group(layers, updates, self.lanes, model.dtype))
        # Layers whose adapters have the same ranks share it.
        self._adapter_R = {
            group.ranks: torch.tensor(group.ranks, device=model.device) for group in self._groups if group.ranks
        }

    def serve(self, blocks: Sequence[Block], step: bool) -> None:
        """Say which block rows of the next forward belong to which lane, and whether it is one token or a prompt.

        Lanes without an adapter come first.
        """
        if (tuple(blocks), step) != self._served:
            shared = [(shares_of(lane, self.lanes), first, last) for lane, first, last in blocks]
            for group in self._groups:
                group.serve(shared, step)
        self._served = tuple(blocks), step

    def serve_slots(self, share_SA: Tensor | None) -> None:
        """Say how much of each adapter, in the order of `lanes`, each row of the next forward is read by.

        The tensor is read while the forward runs, so that a replayed one follows what it holds then. None: no row has
        an adapter.
        """
        self._served, own = None, {}
        if share_SA is not None:
            own = {ranks: share_SA[:, adapter_R] for ranks, adapter_R in self._adapter_R.items()}
        for group in self._groups:
            group.serve_slots(own.get(group.ranks))


def _low(x_SD: Tensor, a_DR: Tensor, constant_R: Tensor | None, own_SR: Tensor) -> Tensor:
    """What each row's own adapters make of it: low_SR."""
    low_SR = x_SD @ a_DR if constant_R is None else torch.addmm(constant_R, x_SD, a_DR)
    return low_SR.mul_(own_SR)


@fused
def _few_low(x_SD: Tensor, a_DR: Tensor, constant_R: Tensor | None, own_SR: Tensor) -> Tensor:
    """As `_low`, as one kernel where a library's product of few rows takes three."""
    precise = torch.promote_types(x_SD.dtype, torch.float32)
    low_SR = (x_SD[:, None].to(precise) * a_DR.T.to(precise)).sum(-1)
    if constant_R is not None:
        low_SR = low_SR + constant_R.to(precise)
    return (low_SR * own_SR).to(x_SD.dtype)


def _fed_alike(model: PreTrainedModel, adapted: Collection[str]) -> list[list[nn.Module]]:
    """The linear layers of a model, grouped by the tensor they are fed, as one forward shows it.

    A layer that the forward calls twice or not at all stands alone, as do those that are no plain linear layers.
    """
    layers = {
        layer: name
        for name, layer in model.named_modules()
        if name in adapted or (type(layer) is nn.Linear and layer is not model.get_output_embeddings())
    }
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}  # held, so that identities differ
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: seen[layer].append(inputs[0])) for layer in layers]
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    groups: dict[Any, list[nn.Module]] = {}
    for layer, inputs in seen.items():
        alike = (id(inputs[0]), layer.weight.device, layer.weight.dtype) if len(inputs) == 1 and _plain(layer) else None
        groups.setdefault(alike or id(layer), []).append(layer)
    return list(groups.values())


def _plain(layer: nn.Module) -> bool:
    """A plain linear layer: not quantised, not parallelised, not watched by anybody's hooks."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not hasattr(layer, "_hf_hook")


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors concatenated along their first axis; no copy where they lie side by side already."""
    first, place = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.is_contiguous() and tensor.storage_offset() == place):
            return torch.cat(list(tensors))
        place += tensor.numel()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


class _Group:
    """Linear layers fed the same tensor, as one product with the low-rank updates of every lane."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        updates: Mapping[str, Sequence[LowRank | None]],
        lanes: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        self._sizes = [(_sizes(layer) or (0, 0))[1] for layer in layers]
        self._plain = layers[0].forward
        self._dtype = dtype
        self._weight_OD: Tensor | None = None
        self._bias_O: Tensor | None = None
        if len(layers) > 1:
            self._join(cast(Sequence[nn.Linear], layers))
        self._updates = {lane: self._stacked(by_name) for lane, by_name in updates.items()}
        # Whose each rank of all adapters side by side is: the adapter's place in `lanes`.
        self.ranks = tuple(lanes.index(lane) for lane, update in self._updates.items() for _ in update.b_RO)
        self._all: LowRank | None = None  # side by side, for slots
        self._own_SR: Tensor | None = None
        self._served: tuple[str, ...] = ()
        self._step = False
        self._rows = self._first = 0
        self._at_work: tuple[LowRank, LowRank] | None = None  # for a step, for a prompt
        self._share_LR: Tensor | None = None  # None: all ranks at work are all rows' own
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()
        for place, layer in enumerate(layers):
            layer.forward = self._product if len(layers) == 1 else partial(self._output, place)

    def _join(self, layers: Sequence[nn.Linear]) -> None:
        weight_OD = self._weight_OD = _side_by_side([layer.weight.data for layer in layers])
        for layer, weight in zip(layers, weight_OD.split(self._sizes), strict=True):
            layer.weight.data = weight
        biases = [layer.bias for layer in layers]
        if any(bias is not None for bias in biases):
            self._bias_O = torch.cat(
                [
                    weight_OD.new_zeros(size) if bias is None else bias.data
                    for bias, size in zip(biases, self._sizes, strict=True)
                ]
            )

    def _stacked(self, updates: Sequence[LowRank | None]) -> LowRank:
        present = [update for update in updates if update is not None]
        a_DR = torch.cat([update.a_DR for update in present], dim=1)
        b_RO = a_DR.new_zeros(a_DR.shape[1], sum(self._sizes))
        rank = 0
        for place, update in enumerate(updates):
            if update is not None:
                last, start = rank + len(update.b_RO), sum(self._sizes[:place])
                b_RO[rank:last, start : start + self._sizes[place]] = update.b_RO
                rank = last
        return LowRank(a_DR, b_RO, _constants(present))

    def serve(self, blocks: Sequence[tuple[Mapping[str, float], int, int]], step: bool) -> None:
        self._input, self._outputs, self._step = None, (), step  # a forward that failed may have left something
        self._own_SR = None
        served = [
            (own, first, last)
            for shares, first, last in blocks
            if last > first and (own := {name: share for name, share in shares.items() if name in self._updates})
        ]
        adapters = tuple(dict.fromkeys(name for own, _, _ in served for name in own))
        if adapters != self._served:
            self._served, self._at_work = adapters, None
            if adapters:
                update = _ranks_side_by_side([self._updates[name] for name in adapters])
                # Few rows are multiplied faster in float32, many in the model's own precision. Deciding by step or
                # prompt, and not by count, leaves a row's numbers alone when others join it.
                self._at_work = update, update.to(self._dtype)
        if self._at_work is None:
            return
        self._rows, self._first = max(last for _, _, last in blocks), served[0][1]
        # Rows are multiplied with every adapter's A in one product; of what is not their own adapter's 0 is kept.
        share_LR = torch.zeros(self._rows, self._at_work[0].a_DR.shape[1])
        rank = 0
        for name in adapters:
            width = self._updates[name].a_DR.shape[1]
            for own, first, last in served:
                share_LR[first:last, rank : rank + width] = own.get(name, 0.0)
            rank += width
        share_LR = share_LR[self._first :]
        self._share_LR = None if bool((share_LR == 1).all()) else share_LR.to(self._at_work[0].a_DR.device)

    def serve_slots(self, own_SR: Tensor | None) -> None:
        """As `serve`, with rows in any order: how much of each rank is a row's own; None: nothing adapts the layers."""
        self._input, self._outputs, self._own_SR = None, (), own_SR
        if own_SR is None:
            self._at_work, self._served = None, ()
        elif self._all is None:
            update = _ranks_side_by_side(list(self._updates.values())).to(self._dtype)
            self._all = LowRank(update.a_DR.T.contiguous().T, update.b_RO, update.constant_R)

    def _output(self, place: int, hidden: Tensor) -> Tensor:
        """The output of the layer at `place`; the first of the group to be asked computes all."""
        if hidden is not self._input:
            self._outputs, self._input = self._product(hidden).split_with_sizes(self._sizes, -1), hidden
        output = self._outputs[place]
        if place == len(self._sizes) - 1:
            self._input, self._outputs = None, ()
        return output

    def _unadapted(self, x_LTD: Tensor) -> Tensor:
        return self._plain(x_LTD) if self._weight_OD is None else F.linear(x_LTD, self._weight_OD, self._bias_O)

    def _product(self, x_LTD: Tensor) -> Tensor:
        if self._own_SR is not None:
            return self._slots_product(x_LTD, self._own_SR)
        y_LTO = self._unadapted(x_LTD)
        if self._at_work is None:
            return y_LTO
        if x_LTD.dim() != 3 or x_LTD.shape[0] != self._rows:
            raise UserError("an adapted layer does not see [row, time, feature]: merge the adapter into its base.")
        update = self._at_work[0 if self._step else 1]
        low_LTR = x_LTD[self._first :].to(update.a_DR.dtype) @ update.a_DR
        if update.constant_R is not None:
            low_LTR += update.constant_R
        if self._share_LR is not None:
            low_LTR.mul_(self._share_LR[:, None])
        y_LTO[self._first :] += low_LTR @ update.b_RO
        return y_LTO

    def _slots_product(self, x_STD: Tensor, own_SR: Tensor) -> Tensor:
        """The product of a step whose rows are slots: every row times every adapter, what is not its own blanked."""
        assert self._all is not None
        a_DR, b_RO, constant_R = self._all.a_DR, self._all.b_RO, self._all.constant_R
        count = x_STD.shape[1]
        x_ND = x_STD.flatten(0, 1)
        own_NR = own_SR if count == 1 else own_SR.repeat_interleave(count, dim=0)
        low = _few_low if len(x_ND) <= _FEW else _low
        # The small product runs while the large one waits for its weights.
        low_NR, y_STO = side_by_side(
            lambda: low(x_ND, a_DR, constant_R, own_NR), lambda: self._unadapted(x_STD), device=x_STD.device
        )
        y_STO.flatten(0, 1).addmm_(low_NR, b_RO)
        return y_STO
