import dataclasses
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pandas as pd
import pytest
import wandb

from pipeline.config.errors import UserError
from pipeline.config.schema import Tracking
from pipeline.report import tracking
from pipeline.stages.train import arm_job

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
    tracking.log_points(with_mode(smoke_params, "offline"), workspace, "group", lines, pd.DataFrame([SAMPLE]))
    runs = list((workspace.scratch / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    written = [file.read_bytes() for file in (workspace.scratch / "wandb").rglob("*") if file.is_file()]
    assert any(b"score_positivity" in content for content in written)
    assert not any(b"a" * 40 in content for content in written)


def test_disabled_writes_nothing(smoke_params, workspace):
    params = with_mode(smoke_params, "disabled")
    tracking.log_points(params, workspace, "group", [LINE], pd.DataFrame([SAMPLE]))
    with tracking.training_logger(params, arm_job(params, workspace, "positivity"), "train", workspace) as logger:
        assert logger is False
    assert not workspace.scratch.exists()


def test_online_without_a_key_is_one_sentence(smoke_params, workspace, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="WANDB_API_KEY is not set"):
        tracking.log_points(with_mode(smoke_params, "online"), workspace, "group", [LINE], pd.DataFrame([SAMPLE]))


class WandbServer(BaseHTTPRequestHandler):
    """What W&B's own client needs of a server to save a report; remembers what it was asked."""

    asked: ClassVar[list[dict]] = []

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        question = json.loads(body) if self.path.endswith("graphql") else {"query": ""}
        self.asked.append(question)
        project = {"id": "cHJvamVjdA==", "internalId": "cHJvamVjdDox", "name": "genarm", "entityName": "us"}
        viewer = {"id": "1", "flags": "{}", "entity": "us", "username": "us", "email": "", "teams": {"edges": []}}
        data = {"viewer": viewer, "project": project}
        if "GetProjects" in question["query"]:
            data["models"] = {"edges": [], "pageInfo": {"hasNextPage": False, "endCursor": None}}
        if "upsertModel" in question["query"]:
            data["result"] = {"project": project, "model": project, "inserted": True}
        if "upsertView" in question["query"]:
            given = question["variables"]
            view = {"id": "VmlldzoxMg==", "project": project, "createdAt": "2026-01-01", "updatedAt": "2026-01-01"}
            view |= {name: given[name] for name in ("type", "name", "displayName", "description", "spec")}
            data["upsertView"] = {"view": view | {"user": viewer | {"name": "us"}}, "inserted": True}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.fixture
def wandb_server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "b" * 40)
    monkeypatch.setattr(WandbServer, "asked", [])
    yield WandbServer
    server.shutdown()


def test_the_report_in_wandb_draws_the_runs_of_the_group_and_those_of_a_baseline(smoke_params, wandb_server):
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    address = tracking.publish_report(with_mode(smoke_params, "offline"), "tiny-12345678", "tiny-before")
    assert "/us/genarm/reports/" in address
    [saved] = [question["variables"] for question in wandb_server.asked if "upsertView" in question["query"]]
    assert "positivity and conciseness on tiny" in saved["displayName"]
    [grid] = [block for block in json.loads(saved["spec"])["blocks"] if block["type"] == "panel-grid"]
    told = json.dumps(grid)
    for name in ("tiny-12345678", "tiny-before", "score_positivity", "alpha_conciseness", "kl", "samples"):
        assert name in told, name
    assert len(grid["metadata"]["runSets"]) == 2
    kinds = {panel["viewType"] for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]}
    assert {"Scatter Plot", "Parallel Coordinates Plot", "Run Comparer"} <= kinds
    assert "b" * 40 not in json.dumps(wandb_server.asked)


def test_offline_runs_hold_the_summaries_and_tables_that_the_report_draws(smoke_params, workspace):
    tracking.log_points(with_mode(smoke_params, "offline"), workspace, "group", [LINE], pd.DataFrame([SAMPLE]))
    wandb.teardown()  # its service writes behind our back until then
    [file] = (workspace.scratch / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for name in (b"score_positivity", b"alpha_positivity", b"samples", b"table-file"):
        assert name in content, name
    [table] = (workspace.scratch / "wandb").rglob("samples*.table.json")
    found = json.loads(table.read_text())
    assert found["columns"][:2] == ["prompt", "response"] and found["data"] == [["Why?", "good", 0.5, 0.1, 1.0]]


@pytest.mark.parametrize("sign", ["no room", "a log that says so"])
def test_a_full_disk_under_an_offline_run_is_told(smoke_params, workspace, monkeypatch, sign):
    finish = wandb.Run.finish

    def full(run):
        finish(run)
        with Path(run.settings.log_internal).open("a") as log:
            log.write("" if sign == "no room" else "writer: failed to save record: no space left on device\n")

    if sign == "no room":
        monkeypatch.setattr(tracking.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr(wandb.Run, "finish", full)
    params = with_mode(smoke_params, "offline")
    with pytest.raises(OSError, match=r"No space left on device: '.*\.wandb'"):
        tracking.log_points(params, workspace, "group", [LINE], pd.DataFrame([SAMPLE]))
    job = arm_job(params, workspace, "positivity")
    with pytest.raises(OSError, match="No space left"), tracking.training_logger(params, job, "train", workspace):
        pass
    with pytest.raises(ZeroDivisionError), tracking.training_logger(params, job, "train", workspace):
        _ = 1 / 0


def test_a_report_without_a_key_is_one_sentence(smoke_params, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="WANDB_API_KEY is not set"):
        tracking.publish_report(smoke_params, "group")
