"""Adapters that were trained as one: an ARM for all mixes of its objectives (PARM, UniARM).

What such an ARM adds to a layer is linear in the weights of the objectives: at weights w it is Σ_i w_i of what it adds
at objective i alone. So it is kept as a plain LoRA adapter for each objective, and a header of their files says that
they are of one mixture. A row is then read by one lane whose update is theirs at the shares of its weights, not by a
lane for each, and log π_r(w) counts by the sum of the weights.
"""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pipeline.config.errors import UserError
from pipeline.data.files import replacing_folder

HEADER = "mixture"  # in the metadata of adapter_model.safetensors: a digest that the adapters of a mixture share


def mixture_of(folder: Path) -> str | None:
    """Which mixture an adapter is of; None of one that was trained by itself, or that is no adapter."""
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
            return (opened.metadata() or {}).get(HEADER)
    except (OSError, SafetensorError):
        return None  # who reads its weights says what is wrong


def mixtures_of(folders: Mapping[str, Path]) -> dict[str, str]:
    """Which mixture each adapter is of, by lane, for those that are of one."""
    return {lane: mixture for lane, folder in folders.items() if (mixture := mixture_of(folder)) is not None}


def lanes_of_weights(weights: Mapping[str, float], mixtures: Mapping[str, str]) -> dict[str, float]:
    """The lanes that read a row, and how much each counts.

    Args:
        weights: α of each ARM, none of them 0.
        mixtures: which mixture an ARM is of, where it is of one.

    Raises:
        UserError: an ARM has a negative weight beside others of its mixture, where nothing was trained.
    """
    lanes = {name: alpha for name, alpha in weights.items() if name not in mixtures}
    for mixture in dict.fromkeys(mixtures[name] for name in weights if name in mixtures):
        parts = {name: alpha for name, alpha in sorted(weights.items()) if mixtures.get(name) == mixture}
        if len(parts) > 1 and min(parts.values()) < 0:
            raise UserError(
                f"{', '.join(parts)} are one ARM for all mixes, which knows no negative weight beside others: give "
                "weights of 0 or more, or one alone."
            )
        total = sum(parts.values())
        lanes[mixed_lane({name: alpha / total for name, alpha in parts.items()})] = total
    return lanes


def mixed_lane(shares: Mapping[str, float]) -> str:
    """The name of the lane that adapters make together, as `0.25 positivity + 0.75 conciseness`; of one, its own."""
    if len(shares) == 1:
        return next(iter(shares))
    return " + ".join(f"{share:.6g} {name}" for name, share in shares.items())


def shares_of(lane: str, adapters: Collection[str]) -> dict[str, float]:
    """How much of each adapter is in a lane, as `mixed_lane` names it; nothing, if it is none of these adapters'."""
    if lane in adapters:
        return {lane: 1.0}
    parts = [part.partition(" ") for part in lane.split(" + ")]
    if len(parts) == 1 or not all(name in adapters for _, _, name in parts):
        return {}
    return {name: float(share) for share, _, name in parts}


def merge(shares: Mapping[Path, float], target: Path) -> Path:
    """Write the one adapter that some of a mixture are together, of their rank; returns its folder.

    Their updates are B · A_i with the same B, so the factors A are averaged.

    Args:
        shares: folder of each adapter, and its share; they sum to 1.
        target: folder that is written, whole or not at all.

    Raises:
        UserError: the adapters are of no common B.
    """
    states, (first, *_) = [load_file(folder / "adapter_model.safetensors") for folder in shares], shares
    factors = [name for name in states[0] if name.endswith(".lora_B.weight")]
    if any(
        state.keys() != states[0].keys() or not all(torch.equal(state[name], states[0][name]) for name in factors)
        for state in states
    ):
        raise UserError(
            f"{', '.join(map(str, shares))} are marked as one ARM for all mixes and are not: train it anew."
        )
    merged = {
        name: torch.stack([state[name] * share for state, share in zip(states, shares.values(), strict=True)]).sum(0)
        for name in states[0]
    }
    with replacing_folder(target) as unfinished:
        save_file(merged, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(first / "adapter_config.json", unfinished / "adapter_config.json")
    return target
