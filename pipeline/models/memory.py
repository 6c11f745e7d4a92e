"""What models need in memory, by arithmetic on their configs alone, and the refusal of what cannot fit.

Nothing is loaded: configs come from fetched folders or, for models of the hub not yet fetched, from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.errors import UserError
from pipeline.config.schema import Model
from pipeline.models.architecture import text_config
from pipeline.models.loading import Source, resolve_dtype

PROMPT = 128  # tokens of a prompt that the cache is reckoned with
_BUFFERS = 1.1  # what buffers and the allocator take on top
_BITS = {"nf4": 4.5, "int8": 8.0}  # per weight, the scales of nf4 included


@dataclass(frozen=True)
class Shape:
    """A model's size by its config."""

    parameters: int  # shared ones once
    matrices: int  # of them, those of the layers, which is what a format of few bits packs
    layers: int
    cached: int  # numbers of the key-value cache per token
    vocabulary: int
    packed_bits: int | None  # of weights that are packed on disk (GPTQ, AWQ)


def shape_of(config: Any) -> Shape:
    """The shape of a causal LM of transformers, built without memory for its weights."""
    packed = getattr(config, "quantization_config", None)
    if packed is not None:
        config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
        packed = packed if isinstance(packed, dict) else packed.to_dict()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    config = text_config(config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        parameters=sum(weight.numel() for weight in model.parameters()),
        matrices=sum(w.numel() for name, w in model.named_parameters() if ".layers." in name and w.dim() == 2),
        layers=int(config.num_hidden_layers),
        cached=2 * int(config.num_hidden_layers * heads * size),
        vocabulary=int(config.vocab_size),
        packed_bits=None if packed is None else int(packed.get("bits", 4)),
    )


def config_of(name: str, spec: Model, folder: Path) -> Any:
    """The config of a model: from its fetched folder, from its source folder, or from the hub.

    Raises:
        UserError: none can be had, or the model is one that only fetching tells the shape of.
    """
    places = [folder, *([Path(spec.location)] if spec.source == "path" else [])]
    for place in places:
        if (place / "config.json").is_file():
            return AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    if spec.source != "hub":
        raise UserError(f"{name} has to be fetched before it can be planned with: run `dvc repro fetch@{name}`.")
    try:
        return AutoConfig.from_pretrained(spec.location, revision=spec.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name}: its config could not be read ({reason}): check the network, or fetch it.") from error


def weight_bytes(shape: Shape, dtype: torch.dtype, quantisation: str | None) -> float:
    """Bytes of the weights in memory."""
    bits = _BITS[quantisation] if quantisation else shape.packed_bits or 8 * dtype.itemsize
    return shape.matrices * bits / 8 + (shape.parameters - shape.matrices) * dtype.itemsize


def cache_bytes(shape: Shape, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of so many rows of so many tokens."""
    return rows * tokens * shape.cached * dtype.itemsize


def available_bytes(device: torch.device, spread: bool) -> int:
    """Free memory of the device, or of all GPUs of the machine together."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    places = range(torch.cuda.device_count()) if spread else [device.index or 0]
    cached = [torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place) for place in places]
    return sum(torch.cuda.mem_get_info(place)[0] for place in places) + sum(cached)  # torch keeps what was freed


@dataclass(frozen=True)
class Need:
    """What one model needs while decoding, in bytes."""

    name: str
    shape: Shape
    weights: float
    cache: float

    @property
    def total(self) -> float:
        """All of it, with what buffers take."""
        return _BUFFERS * (self.weights + self.cache)


@dataclass(frozen=True)
class Loaded:
    """A model that decoding holds in memory."""

    name: str
    source: Source
    config: Any  # of transformers
    lanes: int  # key-value caches: the model's own, and one for each adapter on it that has a say

    @classmethod
    def at(cls, source: Source, lanes: int) -> "Loaded":
        """A model whose folder is there, named as the folder is."""
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        return cls(source.folder.name, source, config, lanes)


def needs_of(models: Sequence[Loaded], rows: int, new_tokens: int, device: torch.device) -> list[Need]:
    """What decoding needs.

    Args:
        models: all that are held at once.
        rows: of a batch.
        new_tokens: the length of a response, at most; prompts are reckoned with `PROMPT` tokens.
        device: where they go.
    """
    needs = []
    for model in models:
        shape, dtype = shape_of(model.config), resolve_dtype(model.source.dtype, device)
        cache = cache_bytes(shape, rows * model.lanes, PROMPT + new_tokens, dtype)
        needs.append(Need(model.name, shape, weight_bytes(shape, dtype, model.source.quantisation), cache))
    return needs


def refuse_too_large(needs: Sequence[Need], device: torch.device, spread: bool) -> None:
    """Stop before anything is loaded that cannot fit.

    Raises:
        UserError: weights and caches exceed the free memory.
    """
    needed, free = sum(need.total for need in needs), available_bytes(device, spread)
    if needed > free:
        listed = " and ".join(f"{need.name} ({need.total / 1e9:.1f} GB)" for need in needs)
        raise UserError(
            f"{listed} need {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} free: lower decoding.batch_size, "
            "set models.<name>.quantisation or device_map, or choose a smaller model."
        )


def training_bytes(shape: Shape, dtype: torch.dtype, quantisation: str | None, whole: bool, shards: int) -> float:
    """Bytes that training takes on each device, activations not counted.

    Trained whole a model takes 16 bytes per parameter (weights, gradient and two moments in float32), dealt out over
    `shards` devices where it is sharded; under a LoRA adapter its weights, beside which those of the adapter are few.
    """
    return 16 * shape.parameters / shards if whole else weight_bytes(shape, dtype, quantisation)


def refuse_training_too_large(
    shape: Shape,
    name: str,
    dtype: torch.dtype,
    quantisation: str | None,
    whole: bool,
    shards: int,
    device: torch.device,
) -> None:
    """Stop before a model is loaded for training that cannot fit.

    Raises:
        UserError: what training takes exceeds the free memory.
    """
    needed, free = training_bytes(shape, dtype, quantisation, whole, shards), available_bytes(device, False)
    if needed > free:
        raise UserError(
            f"training {name} needs {needed / 1e9:.1f} GB beside its activations, {device} has {free / 1e9:.1f} free: "
            "use arm=lora, arm=qlora or trainer=fsdp, or a smaller arm.base."
        )
