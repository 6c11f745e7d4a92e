import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data.row_store import RowStore
from pipeline.stages import share_store
from tests.tiny import ROOT

MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for file in (ROOT / "pipeline").rglob("*.py")
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
)


def test_every_stage_and_tool_is_looked_at():
    assert {
        "pipeline.generation.explain",
        "pipeline.report.playground",
        "pipeline.report",
        "pipeline.stages.train",
    } <= set(MODULES)


def ended(module, monkeypatch, *arguments):
    """Run a module as a command does; return its exit code."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with monkeypatch.context() as context:
        context.delitem(sys.modules, module, raising=False)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return end.code
    return 0


@pytest.mark.parametrize("module", MODULES)
def test_help_shows_an_example_that_can_be_typed(module, monkeypatch, capsys):
    if module == "pipeline.report.playground":
        pytest.importorskip("gradio", reason="gradio is not installed")
    assert not ended(module, monkeypatch, "--help")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith(f"python -m {module}") for line in lines)


def test_an_experiment_in_a_copy_of_the_project_knows_its_finished_rows(tmp_path):
    for copy in ("tmp1", "standalone/tmp2"):
        here = tmp_path / ".dvc" / "tmp" / "exps" / copy
        here.mkdir(parents=True)
        for _ in range(2):  # a stage after another
            share_store(here)
        RowStore(here / "scratch" / "store" / "generate.jsonl", [copy]).add([(copy, {})])
    assert (tmp_path / "scratch" / "store" / "generate.jsonl").read_text().count("\n") == 2
    share_store(tmp_path)
    assert not (tmp_path / "scratch" / "store").is_symlink()


def test_a_zip_download_without_git_is_run_by_dvc(tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    (folder / "dvc.yaml").write_text("stages: {one: {cmd: touch made, outs: [made]}}")
    shutil.copy(ROOT / "Makefile", folder)
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".installed").touch()
    (folder / "requirements.lock").touch()
    os.utime(folder / "requirements.lock", (0, 0))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DVC_SITE_CACHE_DIR": str(tmp_path / "site"), "PYTHONPATH": ""}
    environment["GIT_CEILING_DIRECTORIES"] = str(tmp_path)
    done = subprocess.run(["make", "repro"], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (folder / "made").is_file(), done.stdout + done.stderr


def test_a_missing_argument_is_named(monkeypatch, capsys):
    assert ended("pipeline.stages.train", monkeypatch) == 2
    assert "required: --objective" in capsys.readouterr().err
