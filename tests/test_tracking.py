import dataclasses

import pytest

from pipeline import tracking
from pipeline.config import Tracking, UserError
from pipeline.training import Job

LINE = {
    "method": "genarm",
    "base": "tiny",
    "point": "p1",
    "alpha_positivity": 1.0,
    "score_positivity": 0.5,
    "on_front": True,
}
SAMPLE = {"point": "p1", "prompt": "Why?", "response": "good", "positivity": 0.5, "conciseness": 0.1, "kl": 1.0}


def with_mode(params, mode):
    return dataclasses.replace(params, tracking=Tracking(mode=mode))


def test_offline_is_one_run_per_point_without_network_or_secret(smoke_params, workspace, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    lines = [LINE, {**LINE, "point": "p2", "score_positivity": 0.25}]
    tracking.log_points(with_mode(smoke_params, "offline"), workspace, "group", lines, [SAMPLE])
    runs = list((workspace.scratch / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    written = [file.read_bytes() for file in (workspace.scratch / "wandb").rglob("*") if file.is_file()]
    assert any(b"score_positivity" in content for content in written)
    assert not any(b"a" * 40 in content for content in written)


def test_disabled_writes_nothing(smoke_params, workspace):
    params = with_mode(smoke_params, "disabled")
    tracking.log_points(params, workspace, "group", [LINE], [SAMPLE])
    with tracking.training_logger(params, Job.of(params, workspace, "positivity"), "train", workspace) as logger:
        assert logger is False
    assert not workspace.scratch.exists()


def test_online_without_a_key_is_one_sentence(smoke_params, workspace, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="WANDB_API_KEY is not set"):
        tracking.log_points(with_mode(smoke_params, "online"), workspace, "group", [LINE], [SAMPLE])
