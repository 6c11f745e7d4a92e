"""Rewarded soups (Ramé et al., NeurIPS 2023): one adapter averaged from the objectives' policies.

Averaging weights means averaging the products B · A. Released code of such comparisons averaged the factors A and B by
themselves, whose product is something else; both are here, under names of their own.

Shapes: R rank, D input and O output features.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config.errors import UserError
from pipeline.config.points import BASE, Mix, policy_lane
from pipeline.data.files import replacing_folder
from pipeline.generation.methods import Law, Place

_A, _B = ".lora_A.weight", ".lora_B.weight"


def law(products: bool, mix: Mix, place: Place) -> Law:
    """The merged policy, and as much of the base as the strength leaves."""
    shares = {place.rival(name): share for name, share in mix.shares.items()}
    name = f"{'soup' if products else 'soup_factors'}-{mix.point}"
    target = place.derived(name, shares, mix.shares, lambda target: merge(shares, target, products=products))
    lane = policy_lane(target.name)
    return Law({BASE: 1 - mix.strength, lane: mix.strength}, {lane: target}, shares.keys())


def merge(shares: Mapping[Path, float], target: Path, products: bool) -> None:
    """Write the average of LoRA adapters.

    Args:
        shares: folder of each adapter, and its share.
        target: folder of the average.
        products: average the products B · A, exactly, by an adapter of all ranks together; or else the factors.

    Raises:
        UserError: the adapters are not of one shape.
    """
    states = [load_file(folder / "adapter_model.safetensors") for folder in shares]
    configs = [json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) for folder in shares]
    alike = [(config["r"], config["lora_alpha"], config["use_rslora"], state.keys()) for config, state in
             zip(configs, states, strict=True)]  # fmt: skip
    if any(shape != alike[0] for shape in alike):
        raise UserError(f"the adapters {', '.join(map(str, shares))} differ in rank or layers: train them alike.")
    weights = list(shares.values())
    merged: dict[str, Tensor] = {}
    for name in (name for name in states[0] if name.endswith(_A)):
        factors = [(state[name], state[name.replace(_A, _B)]) for state in states]
        a_RD, b_OR = (stacked if products else averaged)(factors, weights)
        merged |= {name: a_RD.contiguous(), name.replace(_A, _B): b_OR.contiguous()}
    config = configs[0]
    if products:  # alpha / rank, by which the product is scaled, stays what it was
        config |= {"r": config["r"] * len(states), "lora_alpha": config["lora_alpha"] * len(states)}
    with replacing_folder(target) as unfinished:
        save_file(merged, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        (unfinished / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def stacked(factors: list[tuple[Tensor, Tensor]], weights: list[float]) -> tuple[Tensor, Tensor]:
    """Factors whose product is Σ_i w_i B_i A_i, of all ranks together: a_RD, b_OR."""
    b_OR = torch.cat([weight * b for (_, b), weight in zip(factors, weights, strict=True)], dim=1)
    return torch.cat([a for a, _ in factors]), b_OR


def averaged(factors: list[tuple[Tensor, Tensor]], weights: list[float]) -> tuple[Tensor, Tensor]:
    """Σ_i w_i A_i and Σ_i w_i B_i: a_RD, b_OR."""
    a_RD, b_OR = (
        torch.stack([weight * pair[side] for pair, weight in zip(factors, weights, strict=True)]).sum(0)
        for side in (0, 1)
    )
    return a_RD, b_OR
