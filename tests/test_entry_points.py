import runpy
import sys

import pytest

from tests.tiny import ROOT

MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for file in (ROOT / "pipeline").rglob("*.py")
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
)


def test_every_stage_and_tool_is_looked_at():
    assert {"pipeline.explain", "pipeline.playground", "pipeline.report", "pipeline.stages.train"} <= set(MODULES)


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
    if module == "pipeline.playground":
        pytest.importorskip("gradio", reason="gradio is not installed")
    assert not ended(module, monkeypatch, "--help")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith(f"python -m {module}") for line in lines)


def test_a_missing_argument_is_named(monkeypatch, capsys):
    assert ended("pipeline.stages.train", monkeypatch) == 2
    assert "required: --objective" in capsys.readouterr().err
