import pytest
import torch

from pipeline import models
from pipeline.arm import ResponseModel, trainable
from pipeline.config import Arm, UserError
from pipeline.losses import arm_loss
from pipeline.pairs import PromptGroup, collate
from tests.tiny import tiny_model

CPU = torch.device("cpu")
BATCH = collate([PromptGroup([5, 6, 7], [[8, 9, 1], [10, 1]], [(0, 1)])], 0)


def test_without_bitsandbytes_it_is_asked_for(tiny, monkeypatch):
    monkeypatch.setattr("pipeline.models.find_spec", lambda _: None)
    with pytest.raises(UserError, match="nf4 quantisation needs bitsandbytes: pip install bitsandbytes"):
        models.load_model(tiny, torch.float32, CPU, "nf4")


def test_an_adapter_learns_on_a_base_in_four_bits(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tiny_model(500, width=64).save_pretrained(tmp_path)  # its kernels take blocks of 64
    loaded = models.load_model(tmp_path, torch.float32, CPU, "nf4")
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in loaded.modules())
    model = ResponseModel(trainable(loaded, Arm(targets="all-linear"), 0), torch.float32).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learning, lr=2e-2), []
    for _ in range(5):
        logps = model(BATCH)
        loss = arm_loss(logps[BATCH["chosen"]], logps[BATCH["rejected"]], 1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        exact = ResponseModel(models.load_model(tmp_path, torch.float32, CPU), torch.float32)(BATCH)
        near = ResponseModel(models.load_model(tmp_path, torch.float32, CPU, "nf4"), torch.float32)(BATCH)
    assert 0 < (near - exact).norm() < 0.3 * exact.norm()
