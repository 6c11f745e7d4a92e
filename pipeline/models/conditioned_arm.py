"""The LoRA adapter that an ARM for all mixes is at given weights of its objectives.

PARM (Lin et al., ICML 2025) and UniARM (Xie et al., arXiv 2602.09538). Shapes: O objectives, R rank, C conditioned
ranks, D input features.
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

CONDITIONED = "conditioned.safetensors"  # A of every adapted layer, and what the weights make of it
_PARTS = ("factor", "cores", "scales", "shifts")
_A, _B = ".lora_A.weight", ".lora_B.weight"


def collapse(factor_RD: Tensor, cores_OCC: Tensor, weights_O: Tensor) -> Tensor:
    """PARM's LoRA factor A at given weights: its last C ranks are mixed by Σ_i w_i M_i: factor_RD."""
    core_CC = torch.einsum("o,ocd->cd", weights_O, cores_OCC)
    fixed = len(factor_RD) - len(core_CC)
    return torch.cat([factor_RD[:fixed], core_CC @ factor_RD[fixed:]])


def modulate(factor_RD: Tensor, scales_OR: Tensor, shifts_OR: Tensor, weights_O: Tensor) -> tuple[Tensor, Tensor]:
    """UniARM's LoRA factor A at given weights, and what is added behind it: factor_RD, shift_R.

    The features A x, shared by all mixes, undergo an affine map that is linear in the weights, rank by rank:
    (1 + Σ_i w_i s_i) ⊙ A x + Σ_i w_i t_i.
    """
    return factor_RD * (1 + weights_O @ scales_OR)[:, None], weights_O @ shifts_OR


def conditioned(parts: Mapping[str, Tensor], weights_O: Tensor) -> tuple[Tensor, Tensor | None]:
    """A and its shift, if it has one, of a layer at given weights.

    Args:
        parts: `factor` and `cores` of a PARM; `factor`, `scales` and `shifts` of a UniARM.
        weights_O: of the objectives; they sum to 1.
    """
    weights_O = weights_O.to(parts["factor"])
    if "cores" in parts:
        return collapse(parts["factor"], parts["cores"], weights_O), None
    return modulate(parts["factor"], parts["scales"], parts["shifts"], weights_O)


def adapter_at(folder: Path, weights: Mapping[str, float], target: Path) -> Path:
    """Write the LoRA adapter that an ARM for all mixes is at given weights of its objectives, scaled to sum to 1.

    Args:
        folder: of a PARM or a UniARM, as `ConditionedModel.write` leaves it.
        weights: per objective.
        target: the folder of the adapter.

    Raises:
        UserError: the folder holds neither, or it knows none of the objectives that the weights name.
    """
    if not (folder / CONDITIONED).is_file():
        raise UserError(f"{folder} holds no ARM for all mixes: train one (stage tune, kind parm or uniarm).")
    with safe_open(folder / CONDITIONED, "pt") as opened:
        objectives = json.loads(opened.metadata()["objectives"])
    if unknown := weights.keys() - set(objectives):
        raise UserError(f"{folder} is conditioned on {', '.join(objectives)}, not on {min(unknown)}: train it anew.")
    kept, state = load_file(folder / CONDITIONED), load_file(folder / "adapter_model.safetensors")
    total = sum(weights.values())
    weights_O = torch.tensor([weights.get(name, 0.0) / total for name in objectives])
    for name in [name for name in state if name.endswith(_A)]:
        stem = name.removesuffix(_A)
        parts = {
            part: kept[f"{stem}.{part}"] for part in ("factor", "cores", "scales", "shifts") if f"{stem}.{part}" in kept
        }
        factor_RD, shift_R = conditioned(parts, weights_O)
        state[name] = factor_RD.contiguous()
        if shift_R is not None:
            state[f"{stem}.lora_B.bias"] = state[f"{stem}{_B}"] @ shift_R
    with replacing_folder(target) as unfinished:
        save_file(state, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        (unfinished / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return target
