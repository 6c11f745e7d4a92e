"""A Bradley–Terry reward model over whole texts: a scalar head that reads a response's last token, on a LoRA adapter.

It is trained on the pairs that ARMs are trained on, and saved as a plain PEFT adapter of a sequence classifier.
Shapes: B rows, K candidates, T positions, S responses, D features.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
)

from pipeline.config.errors import UserError
from pipeline.data.files import write_json
from pipeline.models.reward_model import SCALE
from pipeline.training.arm import ResponseModel


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
