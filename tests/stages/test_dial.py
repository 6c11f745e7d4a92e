"""A dial from two sentences, in this process and in one of its own."""

import dataclasses
import json
import os
import time

import pytest

from pipeline.config.errors import UserError
from pipeline.report.dial_process import DialProcess
from pipeline.report.dials import dial_params, dials_folder, finished_dials
from pipeline.stages.dial import make_dial
from tests.tiny import ROOT

WARM, COLD = "Answer warmly and with joy.", "Answer coldly and curtly."
FEW = {"train": 16, "validation": 2, "test": 2}


@pytest.fixture
def project(smoke_params, workspace, tiny):
    workspace.models.mkdir()
    workspace.model("tiny").symlink_to(tiny)
    data = dataclasses.replace(smoke_params.data, limits=FEW)
    return dataclasses.replace(smoke_params, data=data, trainer=dataclasses.replace(smoke_params.trainer, epochs=1))


def test_a_dial_is_an_adapter_that_no_stage_reads(project, workspace):
    made = make_dial(project, workspace, "warmth", WARM, COLD)
    assert finished_dials(workspace) == [made] and made.base == "tiny" and 0 <= made.accuracy <= 1
    assert (made.arm / "adapter_model.safetensors").is_file() and "warmth: " in made.verdict
    assert not workspace.arm("warmth").exists() and not workspace.results.exists()


def test_a_dial_made_again_samples_nothing_and_one_that_fails_leaves_the_old_one(project, workspace, monkeypatch):
    first = make_dial(project, workspace, "warmth", WARM, COLD)
    rows = (workspace.scratch / "store/prepare.jsonl").read_bytes()
    assert make_dial(project, workspace, "warmth", WARM, COLD).accuracy == first.accuracy
    assert (workspace.scratch / "store/prepare.jsonl").read_bytes() == rows
    monkeypatch.setattr("pipeline.data.contrast.FEWEST_PAIRS", 1000)
    with pytest.raises(UserError, match="1000 are the fewest"):
        make_dial(project, workspace, "warmth", WARM, COLD)
    assert [dial.name for dial in finished_dials(workspace)] == ["warmth"]
    assert [path.name for path in dials_folder(workspace).iterdir()] == ["warmth"]


@pytest.mark.parametrize(
    ("name", "wanted", "unwanted", "reason"),
    [
        ("warmth", "  ", COLD, "write a sentence"),
        ("warmth", WARM, WARM.lower(), "are the same sentence"),
        ("my dial", WARM, COLD, "a name starts with a letter"),
        ("../up", WARM, COLD, "a name starts with a letter"),
        ("kl", WARM, COLD, "cannot be called kl"),
    ],
)
def test_what_can_be_no_dial_is_refused_at_once(smoke_params, name, wanted, unwanted, reason):
    with pytest.raises(UserError, match=reason):
        dial_params(smoke_params, name, wanted, unwanted)


def test_a_dial_of_labelled_rows_asks_the_embedded_prompts(compose_params):
    params = compose_params(
        "experiment=smoke", "data=own", "data.path=mine.jsonl", "data.sampler=tiny", "data.sampling=null"
    )
    assert dial_params(params, "warmth", WARM, COLD).data.path.endswith("everyday.jsonl")


@pytest.fixture
def folder(tmp_path, tiny, monkeypatch):
    """A project's folder, which is the current one."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny").symlink_to(tiny)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        path = f"data.path={ROOT / 'pipeline/data/prompts/everyday.jsonl'}"
        config = compose(
            "config",
            overrides=["experiment=smoke", path, "trainer.epochs=1", "data.limits={train: 16, validation: 2, test: 2}"],
        )
    OmegaConf.save(config, tmp_path / "params.yaml", resolve=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_a_process_says_how_far_it_is_and_ends_with_a_dial(folder):
    steps = list(DialProcess().make("warmth", WARM, COLD))
    told = [step.step for step in steps]
    assert told[0] == "starting" and told[-1] == "finished"
    assert "sampling responses" in told and "training, epoch 1," in told
    assert any(step.left for step in steps) and all(step.done <= step.total for step in steps)
    assert json.loads((folder / "scratch/dials/warmth/dial.json").read_text())["wanted"] == WARM


def test_a_cancelled_process_is_gone_and_leaves_no_dial(folder):
    process = DialProcess()
    steps = process.make("warmth", WARM, COLD)
    assert next(steps).step == "starting"
    child = process._process
    with pytest.raises(UserError, match="in the making"):
        next(DialProcess.make(process, "other", WARM, COLD))
    started = time.monotonic()
    process.cancel()
    assert [step.step for step in steps][-1] == "cancelled" and time.monotonic() - started < 10
    assert child.poll() is not None and not (folder / "scratch/dials/warmth/dial.json").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_what_the_process_refuses_is_said_in_its_words(folder):
    (folder / "params.yaml").unlink()
    with pytest.raises(UserError, match=r"^params.yaml is missing: write it with `make params`"):
        list(DialProcess().make("warmth", WARM, COLD))
