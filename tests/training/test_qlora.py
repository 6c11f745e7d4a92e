import pytest
import torch

from pipeline.config.errors import UserError
from pipeline.config.schema import Arm
from pipeline.models.loading import load_model
from pipeline.training.arm import ResponseModel, trainable
from pipeline.training.batches import PromptGroup, collate
from pipeline.training.losses import arm_loss
from tests.tiny import tiny_model

CPU = torch.device("cpu")
BATCH = collate([PromptGroup([5, 6, 7], [[8, 9, 1], [10, 1]], [(0, 1)])], 0)


def test_without_bitsandbytes_it_is_asked_for(tiny, monkeypatch):
    monkeypatch.setattr("pipeline.models.fetch.find_spec", lambda _: None)
    with pytest.raises(UserError, match="nf4 quantisation needs bitsandbytes: pip install bitsandbytes"):
        load_model(tiny, torch.float32, CPU, "nf4")


def test_an_adapter_learns_on_a_base_in_four_bits(tmp_path):
    """Its gradients are those over the same weights spelled out, before and after an evaluation."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tiny_model(500, width=64).save_pretrained(tmp_path)  # the kernels take blocks of 64
    quantised = load_model(tmp_path, torch.float32, CPU, "nf4")
    spelled = load_model(tmp_path, torch.float32, CPU)
    layers, changed = dict(quantised.named_modules()), 0.0
    for name, layer in spelled.named_modules():
        if isinstance(layers[name], bitsandbytes.nn.Linear4bit):
            weight = layers[name].weight
            exact = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            changed += float((exact - layer.weight).norm())
            layer.weight.data = exact
    assert changed > 0, "four bits are not what was there"

    def gradients(model):
        logps = model.train()(BATCH)
        arm_loss(logps[BATCH["chosen"]], logps[BATCH["rejected"]], 1.0).mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    found = []
    for loaded in (quantised, spelled):
        model = ResponseModel(trainable(loaded, Arm("tiny", targets="all-linear"), 0, CPU), torch.float32)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(len(name)))
        with torch.no_grad():
            model.eval()(BATCH)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-4, rtol=1e-3)
