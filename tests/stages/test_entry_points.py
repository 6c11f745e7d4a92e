import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pipeline.__main__ import STAGES, TOOLS, main
from pipeline.data.row_store import RowStore
from pipeline.stages import share_store
from tests.tiny import ROOT

COMMANDS = [*STAGES, *TOOLS]


def run(monkeypatch, *arguments):
    """Run the command line in this process, in the project's folder; return its exit code."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
    try:
        main(arguments)
    except SystemExit as end:
        return end.code
    return 0


def test_the_help_lists_every_command_without_loading_what_they_need():
    script = "import runpy, sys; sys.argv = ['pipeline', '--help']; runpy.run_module('pipeline', run_name='__main__');"
    script += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "pydantic", "pandas", "dvc"} & set(done.stderr.split())
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\S", done.stdout, flags=re.MULTILINE), command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_can_be_typed(command, monkeypatch, capsys):
    if command == "playground":
        pytest.importorskip("gradio", reason="gradio is not installed")
    assert not run(monkeypatch, command, "--help")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith(f"python -m pipeline {command}") for line in lines)


def test_every_file_of_the_stages_package_is_a_command_and_there_is_no_other_entry():
    stages = [file for file in (ROOT / "pipeline/stages").glob("*.py") if "def run(params" in file.read_text("utf-8")]
    assert {file.stem for file in stages} == {*STAGES, "dial"}
    mains = [file for file in (ROOT / "pipeline").rglob("*.py") if '__name__ == "__main__"' in file.read_text("utf-8")]
    vllm = ROOT / "pipeline/decoding/vllm"  # what processes of its server begin with
    assert sorted(mains) == [ROOT / "pipeline" / "__main__.py", vllm / "compilation.py", vllm / "run.py"]


COMMAND = re.compile(r"-m pipeline(?:\.(\w+))? ?([\w-]*)")


@pytest.mark.parametrize("name", ["Makefile", "dvc.yaml", ".ci/run", "conf/config.yaml"])
def test_commands_that_other_files_call_are_there(name):
    calls = COMMAND.findall((ROOT / name).read_text(encoding="utf-8"))
    assert calls or name == ".ci/run"
    assert all(not module and command in COMMANDS for module, command in calls), calls


def test_commands_that_texts_show_are_there():
    files = subprocess.run(
        ["git", "ls-files", "*.md", "*.py", "*.j2", "*.ipynb"], cwd=ROOT, capture_output=True, text=True
    )
    shown = 0
    for name in files.stdout.splitlines():
        if name == "CHANGELOG.md" or name.startswith("tests/"):
            continue
        for module, command in COMMAND.findall((ROOT / name).read_text(encoding="utf-8")):
            assert not module and (command in COMMANDS or not command or command == "--help"), name
            shown += 1
    assert shown > 20


def test_dvc_runs_every_stage():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert {shlex.split(stage.get("do", stage)["cmd"])[3] for stage in stages.values()} == set(STAGES)


def test_a_mistyped_command_is_named_with_the_closest_one(monkeypatch):
    assert "there is no command trian: did you mean train?" in run(monkeypatch, "trian")


def test_the_composition_needs_no_torch():
    script = "import sys; from pipeline.__main__ import main; main(['sweep', '--cfg', 'job']);"
    script += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)


def test_stages_without_a_model_load_no_torch():
    """They start in a third of the time; a judge that is a model imports what it needs when it is opened."""
    script = "import sys, pipeline.stages.identify, pipeline.stages.judge, pipeline.stages.pareto;"
    script += "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)


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
    assert run(monkeypatch, "train") == 2
    assert "required: --objective" in capsys.readouterr().err


def test_what_a_user_can_mend_is_one_sentence(monkeypatch, tmp_path):
    def elsewhere(*arguments):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            main(arguments)
        return end.value.code

    for command in (["prepare"], ["plan"], ["trace", "Tips?"]):
        assert elsewhere(*command) == (
            "error: params.yaml is missing: write it with `make params`, in the project's folder."
        )


def test_the_image_of_the_server_copies_what_is_there_and_runs_a_command():
    text, ignored = (ROOT / "Dockerfile").read_text("utf-8"), (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, flags=re.MULTILINE) for name in line.split()]
    assert "pipeline" in copied
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in ignored, f"{name} is not in the build context"
    (command,) = re.findall(r'^ENTRYPOINT \["python", "-m", "pipeline", "(\w+)"\]$', text, flags=re.MULTILINE)
    assert command in TOOLS


def test_the_version_is_one():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == version
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_workflow_runs_what_every_change_must_pass():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step for step in steps if step] == [".ci/run"] and os.access(ROOT / ".ci/run", os.X_OK)
