"""A causal LM with the LoRA adapters that share it, and which models are loaded beside the base."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, DynamicLayer, PreTrainedModel

from pipeline.config.errors import UserError
from pipeline.config.points import BASE, REFERENCE
from pipeline.decoding.fused_lora import AdaptedModel, read_adapter
from pipeline.models.architecture import check_architecture, text_config
from pipeline.models.loading import Source
from pipeline.models.mixtures import mixtures_of, shares_of
from pipeline.models.prompting import Prompter, ends_of
from pipeline.models.vocabulary import check_adapter_tokenizer


class Backbone:
    """A causal LM, its prompter, and the LoRA adapters that share it.

        Backbone(model, prompter, {"positivity": Path("models/arms/positivity")})   # the base and an ARM on it
        Backbone(small, small_prompter, name="helpfulness")                          # an ARM that is its own model

    Args:
        model: a causal LM of transformers whose layers keep keys and values; it keeps its behaviour, and shares its
            weights.
        prompter: the model's tokenizer and prompt template.
        adapters: folders of PEFT LoRA adapters trained on `model`, by lane.
        name: the lane of the model without an adapter; None if it has no say of its own.

    Raises:
        UserError: an adapter is missing, damaged, not made for this model, named like the model, or has another
            tokenizer; the model keeps something else than keys and values, or tells no context length.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompter: Prompter,
        adapters: Mapping[str, Path] | None = None,
        name: str | None = BASE,
    ) -> None:
        adapters = adapters or {}
        for lane, folder in adapters.items():
            if lane in (BASE, name):
                raise UserError(f"an ARM cannot be called {lane}, which is the model it adapts: name it otherwise.")
            check_adapter_tokenizer(prompter, folder, lane)
        check_architecture(model.config, "the base" if name == BASE else str(name or next(iter(adapters), "a model")))
        config = text_config(model.config)
        self.prompter = prompter
        self.lanes = (*([] if name is None else [name]), *adapters)
        self.mixtures = mixtures_of(adapters)  # by lane: which adapters are one ARM for all mixes
        self.device = model.device
        self.context = int(config.max_position_embeddings)
        # Whether any layer looks back a window only; some configurations tell one and do not use it.
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        self.windowed = (
            "sliding_attention" in kinds and (getattr(config, "sliding_window", None) or self.context) < self.context
        )
        self.vocab_size = min(prompter.vocab_size, int(config.vocab_size))
        self.ends = ends_of(prompter, model.generation_config)
        self.adapted = AdaptedModel(model, {lane: read_adapter(folder, model) for lane, folder in adapters.items()})
        # Whether rows are kept in fixed shapes, whose steps a GPU replays: see `pipeline.decoding.static_cache`.
        self.static = self.device.type == "cuda" and has_fixed_shapes(model)
        self.idle: list[Any] = []  # sessions of fixed shapes that wait for rows

    def own(self, lanes: Iterable[str]) -> list[str]:
        """Those of the lanes that run here, in the order of their rows: mixtures of adapters behind all others."""
        named = set(lanes)
        mixed = sorted(lane for lane in named - set(self.lanes) if shares_of(lane, self.adapted.lanes))
        return [lane for lane in self.lanes if lane in named] + mixed


def has_fixed_shapes(model: PreTrainedModel) -> bool:
    """Whether a step of the model can be one of fixed shapes that never waits for the device.

    Not where it looks back a window only, spreads over several devices, is quantised (whose kernels may look at the
    data), routes tokens to experts, or changes its rotary embedding with the length.
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {entry.get("rope_type") for entry in [rope, *rope.values()] if isinstance(entry, dict)}
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    spread = hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)
    routed = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    plain = plain and text_config(config) is config  # and not part of a model that reads pictures as well
    return plain and config._attn_implementation == "sdpa" and not (spread or routed or kinds & {"dynamic", "longrope"})


@dataclass(frozen=True)
class SideBackbone:
    """A backbone that is loaded beside the base's."""

    source: Source
    adapters: Mapping[str, Path] = field(default_factory=dict)
    name: str | None = None

    @property
    def names(self) -> list[str]:
        """Its lanes."""
        return [*([] if self.name is None else [self.name]), *self.adapters]

    def load(self, device: torch.device) -> Backbone:
        """With its weights."""
        return Backbone(self.source.load(device), self.source.prompter(), self.adapters, name=self.name)


def plan_backbones(
    base: Source, arms: Mapping[str, Path], arm_base: Source | None, policies: Mapping[str, Path], reference: bool
) -> tuple[dict[str, Path], list[SideBackbone]]:
    """Which adapters run on the base, and what is loaded beside it: arguments as `GuidedDecoder.load` takes them.

    What adapters beside the base are made from is a lane as well, `reference`: it can be weighed, and drafts.
    """
    whole = {name: folder for name, folder in arms.items() if (folder / "config.json").is_file()}
    adapters = {name: folder for name, folder in arms.items() if name not in whole}
    beside = []
    if arm_base is not None and (adapters or reference):
        beside.append(SideBackbone(arm_base, adapters, REFERENCE))
    for name, folder in whole.items():
        beside.append(SideBackbone(replace(arm_base or base, folder=folder, quantisation=None), name=name))
    return {**policies, **({} if arm_base else adapters)}, beside


def load_backbones(
    base: Source, arms: Mapping[str, Path], arm_base: Source | None, policies: Mapping[str, Path], reference: bool,
    device: torch.device,
) -> list[Backbone]:  # fmt: skip
    """What `plan_backbones` says, with weights; the base's first.

    Raises:
        UserError: a folder is missing or unreadable, or an adapter does not fit its model.
    """
    own, beside = plan_backbones(base, arms, arm_base, policies, reference)
    return [Backbone(base.load(device), base.prompter(), own), *(side.load(device) for side in beside)]
