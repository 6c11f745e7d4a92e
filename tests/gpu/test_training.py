"""Training on a GPU: the curve of the CPU, a killed run taken up again, and sharding over a single device."""

import dataclasses

import pytest
import torch

from pipeline.evaluation.statistics import Bootstrap
from pipeline.models.loading import load_model
from pipeline.training.arm import ARM, ResponseModel, trainable
from pipeline.training.checkpoints import load_trained, newest_checkpoint
from pipeline.training.fit import eval_loader, fit
from pipeline.training.held_out import evaluate
from tests.reference import CPU
from tests.training.test_distributed import OWN, run
from tests.training.test_fit import ARM_LOSS, CONFIG, adapter, groups  # noqa: F401

STEPS = 4 * CONFIG.epochs


def new_module(tiny, smoke_params, device, dropout=0.0, config=CONFIG, dtype=torch.float32):
    arm = dataclasses.replace(smoke_params.arm, dropout=dropout)
    model = trainable(load_model(tiny, dtype, device), arm, 0, device, config.gradient_checkpointing)
    return ARM(ResponseModel(model, dtype), [(0.1, 1.0)], ARM_LOSS, config, STEPS, 0)


def fitted(module, groups, folder, device, config=CONFIG):  # noqa: F811
    held_out = eval_loader(groups[:2], 2, 0)
    _, best = fit(module, groups, held_out, config, folder, False, 0, 0, device)
    load_trained(module, best)


def losses(history):
    return [row["loss"] for row in history]


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_training_draws_the_curve_of_the_cpu(tiny, smoke_params, groups, tmp_path, device, micro_batch_size):  # noqa: F811
    config = dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size)
    here, there = (new_module(tiny, smoke_params, place, config=config) for place in (device, CPU))
    for name, weight in adapter(there).items():
        assert torch.equal(adapter(here)[name].cpu(), weight), "the start is drawn from the seed, wherever"
    fitted(here, groups, tmp_path / "here", device, config)
    fitted(there, groups, tmp_path / "there", CPU, config)
    print(f"device: {losses(here.history)}\nCPU:    {losses(there.history)}")
    assert losses(here.history) == pytest.approx(losses(there.history), abs=1e-3)
    assert len({round(loss, 3) for loss in losses(there.history)}) > 5
    loader = eval_loader(groups, 2, 0)
    found, wanted = (evaluate(each.model, ARM_LOSS, loader, device, Bootstrap(0.95, 50, 0)) for each in (here, there))
    assert found.reward_mean == pytest.approx(wanted.reward_mean, abs=0.05)


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_interrupted_and_resumed_equals_uninterrupted(
    tiny, smoke_params, groups, tmp_path, monkeypatch, device, stop  # noqa: F811
):  # fmt: skip
    config = dataclasses.replace(CONFIG, checkpoint_every=1)
    whole = new_module(tiny, smoke_params, device, 0.1, config)
    fitted(whole, groups, tmp_path / "whole", device, config)
    step = ARM.training_step

    def dying(self, batch, index):
        if self.global_step == stop:
            raise ConnectionError("killed")
        return step(self, batch, index)

    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr(ARM, "training_step", dying)
        fitted(new_module(tiny, smoke_params, device, 0.1, config), groups, tmp_path / "cut", device, config)
    assert newest_checkpoint(tmp_path / "cut").name == f"step={stop:06d}.ckpt"
    resumed = new_module(tiny, smoke_params, device, 0.1, config)
    fitted(resumed, groups, tmp_path / "cut", device, config)
    assert len(resumed.history) == len(whole.history) == STEPS + CONFIG.epochs
    for one, other in zip(resumed.history, whole.history, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_bfloat16_with_gradient_checkpointing_trains(tiny, smoke_params, groups, tmp_path, device):  # noqa: F811
    config = dataclasses.replace(CONFIG, gradient_checkpointing=True, epochs=4)
    half = new_module(tiny, smoke_params, device, config=config, dtype=torch.bfloat16)
    fitted(half, groups, tmp_path, device, config)
    curve = [row["loss"] for row in half.history if row["phase"] == "eval"]
    print(f"bfloat16: {curve}")
    assert curve[-1] < curve[0]


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory, device):
    return run(tiny, tmp_path_factory.mktemp("single") / "run", OWN, accelerator=device.type)


def assert_same_curve(told, wanted):
    found, other = losses(told["history"]), losses(wanted["history"])
    print(f"unsharded: {other}\nsharded:   {found}")
    assert found == pytest.approx(other, abs=1e-3)
    assert told["held_out"]["accuracy"] == wanted["held_out"]["accuracy"]


def test_fsdp_on_one_device_draws_the_curve_of_a_plain_run(tiny, single, tmp_path, device):
    told, weights = run(tiny, tmp_path / "run", OWN, strategy="fsdp", devices=1, accelerator=device.type)
    assert_same_curve(told, single[0])
    assert weights.keys() == single[1].keys()


def test_fsdp_on_one_device_killed_and_run_again_draws_it_too(tiny, single, tmp_path, device):
    how = {"strategy": "fsdp", "devices": 1, "accelerator": device.type, "checkpoint_every": 2}
    run(tiny, tmp_path / "run", OWN, "5", check=False, **how)
    assert list((tmp_path / "run").glob("scratch/train/*/step=000004.ckpt"))
    assert_same_curve(run(tiny, tmp_path / "run", OWN, **how)[0], single[0])
