"""Reading a trained reward model: a scalar head on a sequence classifier, its adapter merged in."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
)

from pipeline.config.errors import UserError
from pipeline.models.loading import load_model

SCALE = "reward_scale.json"  # mean and standard deviation of held-out rewards: those of two objectives are on no scale


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
    config = AutoConfig.from_pretrained(base, local_files_only=True, num_labels=1, trust_remote_code=False)
    classifier: Any = AutoModelForSequenceClassification.from_config(
        config, dtype=torch.float32, trust_remote_code=False
    )
    causal: Any = load_model(base, torch.float32, torch.device("cpu"))  # its files hold no head of that kind
    classifier.base_model.load_state_dict(causal.base_model.state_dict())
    adapted: Any = PeftModel.from_pretrained(classifier, str(folder))
    return adapted.merge_and_unload()
