"""A Bradley–Terry reward model over whole texts: a scalar head that reads a response's last token, on a LoRA adapter.

It is trained on the pairs that ARMs are trained on, and saved as a plain PEFT adapter of a sequence classifier.
Shapes: B rows, K candidates, T positions, S responses, D features.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from pipeline.arm import ResponseModel
from pipeline.config import UserError
from pipeline.models import load_model
from pipeline.store import write_json

SCALE = "reward_scale.json"  # mean and standard deviation of held-out rewards: those of two objectives are on no scale


class RewardModel(ResponseModel):
    """r(x, y), read at the last token of y: what a preference loss compares in the place of log π_r(y|x).

    With β = 1 the ARM loss is −log σ(r(x, y_w) − r(x, y_l)), that of Bradley and Terry (Ouyang et al. 2022).

    Raises:
        UserError: transformers has no classifier on this kind of model, so it could not be read again.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        if type(self.causal.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise UserError(
                f"base: transformers has no sequence classifier of the kind {self.causal.config.model_type}: train "
                "reward models on another (tune.bases)."
            )
        size = self.causal.get_output_embeddings().weight.shape[1]
        self.score = nn.Linear(size, 1, bias=False, device=self.causal.device, dtype=torch.float32)
        nn.init.normal_(self.score.weight, std=(size + 1) ** -0.5)  # as Stiennon et al. (2020) begin

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The reward of every response of a collated batch: reward_S."""
        with self._mixed(batch):
            row_S, column_S = batch["last"].unbind(1)
            hidden_SD = self._states(batch)[row_S, column_S]
        reward_S: Tensor = self.score(hidden_SD.to(self.score.weight.dtype))[:, 0]
        return reward_S

    def write(self, folder: Path, base: str, mean: float, std: float) -> None:
        """An adapter of AutoModelForSequenceClassification with one label, head included, and its scale."""
        adapted: Any = self.model
        config = adapted.peft_config["default"]
        config.task_type, config.modules_to_save, config.base_model_name_or_path = "SEQ_CLS", ["score"], base
        config.target_modules = sorted(config.target_modules)
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        state["base_model.model.score.weight"] = self.score.weight.detach()
        config.inference_mode = True
        config.save_pretrained(str(folder))
        tensors = {name: value.contiguous().cpu() for name, value in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / SCALE, {"mean": mean, "std": std})


def reward_scale(folder: Path) -> tuple[float, float]:
    """Mean and standard deviation of the rewards on held-out responses, as written beside the adapter.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        scale = json.loads((folder / SCALE).read_text(encoding="utf-8"))
        return float(scale["mean"]), float(scale["std"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / SCALE} is missing or damaged: train the reward model again (stage tune)."
        ) from error


def merged_classifier(folder: Path, base: Path) -> Any:
    """The sequence classifier of one label that an adapter makes of a base, merged, in float32 on the CPU.

    Args:
        folder: of the adapter, as `RewardModel.write` leaves it.
        base: folder of the causal LM that it was trained on.
    """
    config = AutoConfig.from_pretrained(base, local_files_only=True, num_labels=1)
    classifier: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    causal: Any = load_model(base, torch.float32, torch.device("cpu"))  # its files hold no head of that kind
    classifier.base_model.load_state_dict(causal.base_model.state_dict())
    adapted: Any = PeftModel.from_pretrained(classifier, str(folder))
    return adapted.merge_and_unload()
