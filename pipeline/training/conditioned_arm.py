"""One ARM for all mixes of objectives: a LoRA adapter conditioned on their weights w.

PARM (Lin et al., ICML 2025): its update is B · C(w) · A with a core C(w) = diag(I, Σ_i w_i M_i): half of the ranks
serve every mix, half depend on the weights linearly (the paper's bilinear adaptation, its fixed core folded into A).
UniARM (Xie et al., arXiv 2602.09538): all ranks serve every mix, and the weights scale and shift what they read,
B · (γ(w) ⊙ A x + δ(w)), with γ and δ linear in the weights. Both learn by Σ_i w_i L_i. For given weights each is an
ordinary LoRA adapter (a UniARM with PEFT's `lora_bias`), and that is what decoding runs.

Shapes: O objectives, R rank, C conditioned ranks, D input features.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config.errors import UserError
from pipeline.models.conditioned_arm import CONDITIONED, conditioned
from pipeline.training.arm import ARM, ResponseModel

Kind = Literal["parm", "uniarm"]


def _start(kind: Kind, objectives: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What the weights act by, before training.

    Drawn for each objective by itself: what begins alike leaves all mixes one adapter for too long.
    """
    if kind == "parm":
        size = rank // 2
        return {"cores": torch.randn(objectives, size, size, generator=generator) * size**-0.5}
    scales_OR = torch.randn(objectives, rank, generator=generator)
    return {"scales": scales_OR, "shifts": torch.zeros(objectives, rank)}


class _Conditioned(nn.Linear):
    """LoRA's A with what the weights make of it."""

    def __init__(self, plain: nn.Linear, start: dict[str, Tensor], objectives: int) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        self.acting = nn.ParameterDict({name: nn.Parameter(value.to(plain.weight)) for name, value in start.items()})
        self.weights_O: Tensor = torch.full((objectives,), 1 / objectives)

    @property
    def parts(self) -> dict[str, Tensor]:
        """As `conditioned` takes them."""
        return {"factor": self.weight, **self.acting}

    def forward(self, input: Tensor) -> Tensor:
        """A(w) · x + δ(w)."""
        return F.linear(input, *conditioned(self.parts, self.weights_O))


class ConditionedModel(ResponseModel):
    """A `ResponseModel` whose adapter depends on the weights of the objectives."""

    def __init__(
        self, model: PreTrainedModel | PeftModel, dtype: torch.dtype, objectives: Sequence[str], kind: Kind
    ) -> None:
        super().__init__(model, dtype)
        self.objectives = tuple(objectives)
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        for layer in model.modules():
            factors: Any = getattr(layer, "lora_A", None)
            if isinstance(factors, nn.ModuleDict) and "default" in factors:
                plain: Any = factors["default"]
                if plain.out_features < 2:
                    raise UserError("an ARM for all mixes conditions its ranks: set arm.rank to 2 at least.")
                start = _start(kind, len(objectives), plain.out_features, generator)
                factors["default"] = _Conditioned(plain, start, len(objectives))

    @property
    def _factors(self) -> dict[str, _Conditioned]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, _Conditioned)}

    def condition(self, weights_O: Tensor) -> None:
        """Set the weights of the objectives, which sum to 1."""
        for factor in self._factors.values():
            weights_O = factor.weights_O = weights_O.to(factor.weight)  # copied once, not for every layer

    def write(self, folder: Path, base: str) -> None:
        """The adapter at equal weights as PEFT writes it, and what it becomes at others."""
        adapted: Any = self.model
        config = adapted.peft_config["default"]
        self.condition(torch.full((len(self.objectives),), 1 / len(self.objectives)))
        kept: dict[str, Tensor] = {}
        for name, factor in self._factors.items():
            stem = name.removesuffix(".lora_A.default")
            kept |= {f"{stem}.{part}": value.detach() for part, value in factor.parts.items()}
            factor_RD, shift_R = conditioned(factor.parts, factor.weights_O)
            plain = nn.Linear(factor.in_features, factor.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(factor_RD.detach())
            adapted.get_submodule(name.removesuffix(".default"))["default"] = plain
            if shift_R is not None:
                other = adapted.get_submodule(f"{stem}.lora_B.default")
                other.bias = nn.Parameter((other.weight @ shift_R).detach())
                config.lora_bias = True
        config.base_model_name_or_path, config.target_modules = base, sorted(config.target_modules)
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        header = {"format": "pt", "objectives": json.dumps(self.objectives)}
        tensors = {name: value.contiguous().cpu() for name, value in kept.items()}
        save_file(tensors, folder / CONDITIONED, metadata=header)


class ConditionedARM(ARM):
    """Trains an ARM for all mixes: every batch has a mix of its own, drawn evenly; Σ_i w_i L_i is its loss."""

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
