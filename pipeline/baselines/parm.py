"""PARM (Lin et al., ICML 2025): one ARM for all mixes of objectives, a LoRA adapter conditioned on their weights.

Its update is B · C(w) · A with a core C(w) = diag(I, Σ_i w_i M_i): half of the ranks serve every mix, half depend on
the weights w linearly (the paper's bilinear adaptation, its fixed core folded into A). For given weights it is an
ordinary LoRA adapter, C(w) · A in the place of A, and that is what decoding runs.

Shapes: O objectives, R rank, C conditioned ranks, D input features.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.arm import ARM, ResponseModel
from pipeline.baselines import Law, Mix, Place
from pipeline.config import UserError
from pipeline.generation import policy_lane
from pipeline.store import replacing_folder

_CORES = "preference_cores.safetensors"  # A and the M_i of every adapted layer
_FACTOR = ".lora_A.weight"


class _Conditioned(nn.Linear):
    """LoRA's A with the core behind it."""

    def __init__(self, plain: nn.Linear, objectives: int, generator: torch.Generator) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        size = plain.out_features // 2
        # Drawn for each objective by itself: cores that begin alike leave all mixes one adapter for too long.
        start_OCC = torch.randn(objectives, size, size, generator=generator) * size**-0.5
        self.cores_OCC = nn.Parameter(start_OCC.to(plain.weight))
        self.weights_O: Tensor = torch.full((objectives,), 1 / objectives)

    def collapsed(self) -> Tensor:
        """C(w) · A: factor_RD."""
        return collapse(self.weight, self.cores_OCC, self.weights_O.to(self.cores_OCC))

    def forward(self, input: Tensor) -> Tensor:
        """C(w) · A · x."""
        return F.linear(input, self.collapsed())


def collapse(factor_RD: Tensor, cores_OCC: Tensor, weights_O: Tensor) -> Tensor:
    """The LoRA factor A at given weights: its last C ranks are mixed by Σ_i w_i M_i: factor_RD."""
    core_CC = torch.einsum("o,ocd->cd", weights_O, cores_OCC)
    fixed = len(factor_RD) - len(core_CC)
    return torch.cat([factor_RD[:fixed], core_CC @ factor_RD[fixed:]])


class ConditionedModel(ResponseModel):
    """A `ResponseModel` whose adapter depends on the weights of the objectives."""

    def __init__(self, model: PreTrainedModel | PeftModel, dtype: torch.dtype, objectives: Sequence[str]) -> None:
        super().__init__(model, dtype)
        self.objectives = tuple(objectives)
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        for layer in model.modules():
            factors: Any = getattr(layer, "lora_A", None)
            if isinstance(factors, nn.ModuleDict) and "default" in factors:
                plain: Any = factors["default"]
                if plain.out_features < 2:
                    raise UserError("PARM conditions half of the ranks: set arm.rank to 2 at least.")
                factors["default"] = _Conditioned(plain, len(objectives), generator)

    @property
    def _factors(self) -> dict[str, _Conditioned]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, _Conditioned)}

    def condition(self, weights_O: Tensor) -> None:
        """Set the weights of the objectives, which sum to 1."""
        for factor in self._factors.values():
            factor.weights_O = weights_O

    def write(self, folder: Path, base: str) -> None:
        """The adapter at equal weights as PEFT writes it, and what it becomes at others."""
        adapted: Any = self.model
        self.condition(torch.full((len(self.objectives),), 1 / len(self.objectives)))
        kept: dict[str, Tensor] = {}
        for name, factor in self._factors.items():
            stem = name.removesuffix(".lora_A.default")
            kept[f"{stem}.factor"], kept[f"{stem}.cores"] = factor.weight.detach(), factor.cores_OCC.detach()
            plain = nn.Linear(factor.in_features, factor.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(factor.collapsed().detach())
            adapted.get_submodule(name.removesuffix(".default"))["default"] = plain
        config = adapted.peft_config["default"]
        config.base_model_name_or_path, config.target_modules = base, sorted(config.target_modules)
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        told = {"format": "pt", "objectives": json.dumps(self.objectives)}
        save_file({name: value.contiguous().cpu() for name, value in kept.items()}, folder / _CORES, metadata=told)


class ConditionedARM(ARM):
    """Trains a PARM: every batch has a mix of its own, drawn evenly from the simplex; Σ_i w_i L_i is its loss."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw the batch's mix after what makes draws a function of seed and step."""
        super().on_train_batch_start(batch, batch_idx)
        objectives = len(self.weight_O)
        self._mix(torch.distributions.Dirichlet(torch.ones(objectives)).sample())

    def on_validation_epoch_start(self) -> None:
        """Held-out pairs are judged at equal weights."""
        self._mix(torch.full((len(self.weight_O),), 1 / len(self.weight_O)))

    def _mix(self, weights_O: Tensor) -> None:
        model: Any = self.model
        model.condition(weights_O)
        self._weights_O = weights_O

    def weights_of(self, objective_B: Tensor) -> Tensor:
        """How much the loss of each pair counts at the mix: weight_B, 1 on average over mixes."""
        shares_O = self._weights_O.to(self.weight_O) * len(self.weight_O)
        return super().weights_of(objective_B) * shares_O[objective_B]


def law(mix: Mix, place: Place) -> Law:
    """log π_base + Σα · log π_r(w), with the PARM at the mix's shares and the sum of the weights in the place of α.

    Raises:
        UserError: none is trained.
    """
    rivals = place.params.tune.rivals
    name = next((name for name, rival in rivals.items() if rival.kind == "parm"), None)
    if name is None:
        raise UserError("no PARM is trained: add one to tune.rivals, with kind: parm.")
    source = place.rival(name)
    folder = adapter_at(source, mix.shares, place.derived / f"{name}-{mix.point}")
    return Law(
        {policy_lane(folder.name): mix.strength * sum(mix.weights.values())},
        {policy_lane(folder.name): folder},
        {source},
    )


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
            kept = cores[f"{stem}.factor"], cores[f"{stem}.cores"]
            state[name] = collapse(*kept, weights_O.to(kept[0])).contiguous()
    with replacing_folder(target) as unfinished:
        save_file(state, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        (unfinished / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return target
