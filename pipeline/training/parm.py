"""PARM (Lin et al., ICML 2025): one ARM for all mixes of objectives, a LoRA adapter conditioned on their weights.

Its update is B · C(w) · A with a core C(w) = diag(I, Σ_i w_i M_i): half of the ranks serve every mix, half depend on
the weights w linearly (the paper's bilinear adaptation, its fixed core folded into A). For given weights it is an
ordinary LoRA adapter, C(w) · A in the place of A, and that is what decoding runs.

Shapes: O objectives, R rank, C conditioned ranks, D input features.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config.errors import UserError
from pipeline.models.parm import _CORES, collapse
from pipeline.training.arm import ARM, ResponseModel


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
        header = {"format": "pt", "objectives": json.dumps(self.objectives)}
        save_file({name: value.contiguous().cpu() for name, value in kept.items()}, folder / _CORES, metadata=header)


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
