"""Several processes on one CPU: the same steps, the same loss, the same weights as one process."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

MODULE, OWN = "tests.distributed", [sys.executable, "-m"]  # Lightning starts the other processes itself
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def run(tiny, folder, launcher, *args, check=True, **overrides):
    if not folder.exists():
        shutil.copytree(tiny, folder / "models" / "tiny")
    command = [*launcher, MODULE, json.dumps(overrides), str(folder), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((folder / "curve.json").read_text()), load_file(folder / "arm.safetensors")
    assert done.returncode != 0
    return None


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory):
    return run(tiny, tmp_path_factory.mktemp("single") / "run", OWN)


def assert_same(found, wanted):
    (told, weights), (wanted_told, wanted_weights) = found, wanted
    losses, wanted_losses = ([row["loss"] for row in part["history"]] for part in (told, wanted_told))
    print(f"one process: {wanted_losses}\nthis run:    {losses}")
    assert losses == pytest.approx(wanted_losses, abs=2e-5)
    assert [row["pairs"] for row in told["history"]] == [row["pairs"] for row in wanted_told["history"]]
    assert told["held_out"]["accuracy"] == wanted_told["held_out"]["accuracy"]
    assert weights.keys() == wanted_weights.keys()
    for name, weight in wanted_weights.items():
        # Gradients are summed in another order, and Adam makes whole steps of what is all but zero.
        assert torch.linalg.norm(weights[name] - weight) < 1e-3 * torch.linalg.norm(weight)


def test_two_ddp_processes_with_micro_batches_draw_the_curve_of_one_process(tiny, single, tmp_path):
    assert_same(run(tiny, tmp_path / "run", TORCHRUN, strategy="ddp", devices=2, micro_batch_size=1), single)


def test_two_fsdp_processes_killed_and_run_again_draw_the_curve_of_one_process(tiny, single, tmp_path):
    how = {"strategy": "fsdp", "devices": 2, "checkpoint_every": 2}
    run(tiny, tmp_path / "run", OWN, "5", check=False, **how)
    (checkpoint, *_) = (tmp_path / "run").glob("scratch/train/*/step=000004.ckpt")
    held = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {name.removeprefix("model.") for name in held} == set(single[1]), "what is trained, and nothing else"
    assert_same(run(tiny, tmp_path / "run", OWN, **how), single)
