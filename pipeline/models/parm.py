"""The LoRA adapter that a PARM is at given weights of its objectives (Lin et al., ICML 2025).

Shapes: O objectives, R rank, C conditioned ranks, D input features.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config.errors import UserError
from pipeline.data.files import replacing_folder

_CORES = "preference_cores.safetensors"  # A and the M_i of every adapted layer
_FACTOR = ".lora_A.weight"


def collapse(factor_RD: Tensor, cores_OCC: Tensor, weights_O: Tensor) -> Tensor:
    """The LoRA factor A at given weights: its last C ranks are mixed by Σ_i w_i M_i: factor_RD."""
    core_CC = torch.einsum("o,ocd->cd", weights_O, cores_OCC)
    fixed = len(factor_RD) - len(core_CC)
    return torch.cat([factor_RD[:fixed], core_CC @ factor_RD[fixed:]])


def adapter_at(folder: Path, weights: Mapping[str, float], target: Path) -> Path:
    """Write the LoRA adapter that a PARM is at given weights of its objectives, scaled to sum to 1.

    Args:
        folder: of a PARM, as `ConditionedModel.write` leaves it.
        weights: per objective.
        target: the folder of the adapter.

    Raises:
        UserError: the folder holds no PARM, or it knows none of the objectives that the weights name.
    """
    if not (folder / _CORES).is_file():
        raise UserError(f"{folder} holds no PARM: train one (stage tune, kind parm).")
    with safe_open(folder / _CORES, "pt") as opened:
        objectives = json.loads(opened.metadata()["objectives"])
    if unknown := weights.keys() - set(objectives):
        raise UserError(f"{folder} is conditioned on {', '.join(objectives)}, not on {min(unknown)}: train it anew.")
    cores, state = load_file(folder / _CORES), load_file(folder / "adapter_model.safetensors")
    total = sum(weights.values())
    weights_O = torch.tensor([weights.get(name, 0.0) / total for name in objectives])
    for name in state:
        if name.endswith(_FACTOR):
            stem = name.removesuffix(_FACTOR)
            factor_RD, cores_OCC = cores[f"{stem}.factor"], cores[f"{stem}.cores"]
            state[name] = collapse(factor_RD, cores_OCC, weights_O.to(factor_RD)).contiguous()
    with replacing_folder(target) as unfinished:
        save_file(state, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        (unfinished / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return target
