"""One ARM for all mixes of objectives: a LoRA adapter conditioned on their weights w.

PARM (Lin et al., ICML 2025): its update is B · C(w) · A with a core C(w) = diag(I, Σ_i w_i M_i): half of the ranks
serve every mix, half depend on the weights linearly (the paper's bilinear adaptation, its fixed core folded into A).
UniARM (Xie et al., arXiv 2602.09538): all ranks serve every mix, and the weights scale and shift what they read,
B · (γ(w) ⊙ A x + δ(w)), with γ and δ linear in the weights. Both learn by Σ_i w_i L_i. At given weights, which sum to
1, each is Σ_i w_i of what it is at objective i alone: an ordinary LoRA adapter (a UniARM with PEFT's `lora_bias`). So
one for each objective is written, and decoding mixes them (`pipeline.models.mixtures`).

Shapes: O objectives, R rank, C conditioned ranks, D input features.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config.errors import UserError
from pipeline.models.mixtures import HEADER
from pipeline.training.arm import ARM, ResponseModel

Kind = Literal["parm", "uniarm"]


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

    def alone(self, objective: int) -> Tensor:
        """The weights that give one objective, by its place, all the weight: weights_O."""
        return F.one_hot(torch.tensor(objective), len(self.objectives)).float()

    @torch.no_grad()
    def write(self, folder: Path, base: str) -> list[Path]:
        """A plain LoRA adapter for each objective, as PEFT writes it, in a folder of its name; returns the folders."""
        adapted: Any = self.model
        config = adapted.peft_config["default"]
        config.base_model_name_or_path, config.target_modules = base, sorted(config.target_modules)
        written = {name: self._adapter(place) for place, name in enumerate(self.objectives)}
        config.lora_bias = any(key.endswith(".lora_B.bias") for key in next(iter(written.values())))
        mixture = sha256(b"".join(save(tensors) for tensors in written.values())).hexdigest()[:32]
        for name, tensors in written.items():
            config.save_pretrained(str(folder / name))
            header = {"format": "pt", HEADER: mixture}
            save_file(tensors, folder / name / "adapter_model.safetensors", metadata=header)
        return [folder / name for name in written]

    def _adapter(self, objective: int) -> dict[str, Tensor]:
        """The adapter's weights where this objective has all the weight, by PEFT's names."""
        weights_O = self.alone(objective)
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        tensors = {key: value for key, value in state.items() if ".acting." not in key}
        for name, factor in self._factors.items():
            stem = name.removesuffix(".lora_A.default")
            factor_RD, shift_R = conditioned(factor.parts, weights_O)
            tensors[f"{stem}.lora_A.weight"] = factor_RD
            if shift_R is not None:
                tensors[f"{stem}.lora_B.bias"] = tensors[f"{stem}.lora_B.weight"] @ shift_R
        return {key: value.detach().contiguous().cpu() for key, value in sorted(tensors.items())}


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
