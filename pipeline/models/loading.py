"""Loading a causal LM: device, dtype, quantisation; and `Source`, a model on disk with how it is prompted."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from pipeline.config.errors import UserError
from pipeline.config.schema import Model
from pipeline.config.workspace import Workspace
from pipeline.models.architecture import text_config
from pipeline.models.identity import ORIGIN
from pipeline.models.prompting import Prompter


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; of several processes on a machine, each has a GPU of its own.

    Raises:
        UserError: a GPU is requested where there is none.
    """
    name = {"auto": "cuda" if torch.cuda.is_available() else "cpu", "gpu": "cuda"}.get(name, name)
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UserError(
            "a GPU is asked for, but torch finds none: use auto or cpu (decoding.device, trainer.accelerator)."
        )
    return torch.device(name, int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies in it (elsewhere it is slower), else float32.

    Raises:
        UserError: the name is no floating-point dtype of torch.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
        return torch.bfloat16 if device.type == "cpu" and native else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"the dtype of a model is {name}: use auto, float32, bfloat16 or float16.")
    return dtype


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantisation: str | None = None,
    device_map: str | None = None,
) -> PreTrainedModel:
    """The causal LM of a local folder, frozen, in eval mode.

    Args:
        folder: config and safetensors; weights that are quantised there (GPTQ, AWQ) need that format's package.
        dtype: of the weights that are not quantised.
        device: where it goes.
        quantisation: nf4 or int8, of its linear layers, by bitsandbytes.
        device_map: how accelerate spreads it over the GPUs of a machine; None: it stays on `device`.

    Raises:
        UserError: the folder is missing or unreadable, or lacks weights, or a package is not installed.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model: run `dvc repro`, or correct the path.")
    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    if quantisation is not None:
        if find_spec("bitsandbytes") is None:
            raise UserError(f"{quantisation} quantisation needs bitsandbytes: pip install bitsandbytes.")
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        bits = four | {"bnb_4bit_compute_dtype": dtype} if quantisation == "nf4" else {"load_in_8bit": True}
        how["quantization_config"] = BitsAndBytesConfig(**bits)
    if quantisation is not None or device_map is not None:
        how["device_map"] = device_map or {"": device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, **how, output_loading_info=True, trust_remote_code=False
        )
    except ImportError as error:
        raise UserError(
            f"{folder} needs a package that is not installed ({str(error).splitlines()[0]}): install the extra "
            "gptq, awq or quantised of pyproject.toml."
        ) from error
    except Exception as error:
        raise UserError(f"{folder} could not be loaded ({error}): run `dvc repro --force fetch`.") from error
    model, loading = loaded
    if lacking := sorted(loading["missing_keys"]):  # transformers would make them up
        raise UserError(f"{folder} lacks the weights {lacking[0]}: use a folder that holds a whole causal LM.")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes packs the weights on the first evaluation, and a packed layer has no gradient.
            module.support_avx512bf16_for_cpu = False
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen if "device_map" in how else frozen.to(device)  # type: ignore[arg-type]


def model_digest(folder: Path) -> str:
    """The digest of a fetched model's weights and config, as `fetch` wrote it."""
    try:
        return str(json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / ORIGIN} is missing or damaged: run `dvc repro --force fetch`.") from error


@dataclass(frozen=True)
class Source:
    """A model on disk, how it is loaded and how it is prompted."""

    folder: Path
    template: str | None = None
    dtype: str = "auto"
    quantisation: str | None = None
    device_map: str | None = None

    @classmethod
    def of(cls, models: Mapping[str, Model], workspace: Workspace, name: str) -> "Source":
        """The fetched model of that name."""
        spec = models[name]
        return cls(workspace.model(name), spec.template, spec.dtype, spec.quantisation, spec.device_map)

    def load(self, device: torch.device) -> PreTrainedModel:
        """`load_model` as the source says."""
        return load_model(self.folder, resolve_dtype(self.dtype, device), device, self.quantisation, self.device_map)

    def prompter(self) -> Prompter:
        """Its tokenizer and template."""
        return Prompter.load(self.folder, self.template)

    @property
    def context(self) -> int:
        """How many tokens it reads at most."""
        config = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        return int(text_config(config).max_position_embeddings)

    def identity(self, device: torch.device) -> list[Any]:
        """What its log-probabilities depend on, as a JSON value."""
        dtype = str(resolve_dtype(self.dtype, device))
        return [model_digest(self.folder), dtype, device.type, self.template, *filter(None, [self.quantisation])]
