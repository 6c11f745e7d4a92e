import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pipeline.config.schema import Arm
from pipeline.evaluation.statistics import Bootstrap, share
from pipeline.models.loading import load_model
from pipeline.stages.train import arm_job
from pipeline.training import export
from pipeline.training.arm import ResponseModel, trainable
from pipeline.training.batches import PromptGroup, Tokenised, collate
from pipeline.training.fit import Trained
from pipeline.training.held_out import HeldOut

CPU = torch.device("cpu")
BATCH = collate([PromptGroup([5, 6, 7], [[8, 9, 1], [10, 1]], [(0, 1)])], 0)


def changed(tiny, arm):
    model = trainable(load_model(tiny, torch.float32, CPU), arm, 0, CPU)
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    return ResponseModel(model, torch.float32).eval()


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_an_arm_folder_is_what_others_load_with_a_card(tiny, smoke_params, prompter, workspace, tmp_path, tuning):
    arm = Arm("tiny", tuning, targets="all-linear")
    model, params = changed(tiny, arm), dataclasses.replace(smoke_params, arm=arm)
    held_out = HeldOut(
        *(share([True, True, False], [0, 1, 1], Bootstrap(0.95, 50, 0)) for _ in range(3)), None, 0.0, 1.0
    )
    splits = {"train": Tokenised([PromptGroup([5], [[1], [2]], [(0, 1)])])}
    trained = Trained(model, [], 0.0, held_out, splits, 1, tmp_path)
    card = export.model_card(arm_job(params, workspace, "positivity"), "mit", {"pairs digest": "abc"}, trained)
    with torch.no_grad():
        wanted = model(BATCH)
    export.save(model, prompter.tokenizer, tmp_path / "arm", "tiny", card, held_out)
    text = (tmp_path / "arm" / "README.md").read_text(encoding="utf-8")
    library = "peft" if tuning == "lora" else "transformers"
    assert all(
        part in text for part in (f"library_name: {library}", "| β |", "held-out pair accuracy | 0.667", "license: mit")
    )
    if tuning == "lora":
        told = json.loads((tmp_path / "arm" / "adapter_config.json").read_text())
        assert told["base_model_name_or_path"] == "tiny"
        assert told["target_modules"] == sorted(told["target_modules"]), "the same bytes from the same run"
        weights = load_file(tmp_path / "arm/adapter_model.safetensors").values()
        assert all(torch.isfinite(weight).all() for weight in weights)
        again = PeftModel.from_pretrained(load_model(tiny, torch.float32, CPU), str(tmp_path / "arm")).eval()
    else:
        again = load_model(tmp_path / "arm", torch.float32, CPU)
    with torch.no_grad():
        torch.testing.assert_close(ResponseModel(again, torch.float32)(BATCH), wanted)
