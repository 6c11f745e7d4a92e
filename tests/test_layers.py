"""The floors of the package: imports point down, never in a circle, and a stage depends on the code that it runs."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from tests.tiny import ROOT

# A room may import from rooms on lower floors; `pipeline/stages` is the highest.
FLOORS = {
    "config": 1,
    "data": 2,
    "models": 3,
    "decoding": 4,
    "evaluation": 4,
    "training": 5,
    "generation": 5,
    "report": 6,
    "stages": 7,
}
WRITTEN = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in WRITTEN.items()}
DISPATCH = {"pipeline", "pipeline.__main__", "pipeline.stages"}  # they parse the command line and hand over


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pipeline":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules() else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules()}
    return frozenset(found - {module})


def room(module: str) -> str:
    """The package that a module lies in."""
    return module.split(".")[1] if "." in module else ""


def closure(module: str) -> set[str]:
    """All modules that importing one runs, the packages around them included."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        around = [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 2)]
        for one in around:
            if one not in seen and one in modules():
                seen.add(one)
                waiting += imports(one) if one != "pipeline" else ()  # whose public names are imported when used
    return seen


def test_every_module_lies_in_a_room():
    assert {room(module) for module in modules() if module not in DISPATCH} == set(FLOORS)


def test_imports_point_down():
    upwards = [
        f"{module} imports {other}"
        for module in modules().keys() - {"pipeline.__main__"}
        for other in imports(module)
        if room(module) and room(other) and room(module) != room(other)
        if FLOORS[room(other)] >= FLOORS[room(module)]
    ]
    assert not upwards


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter({module: imports(module) for module in modules()}).prepare()  # raises CycleError


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_runs_and_on_no_other(stage):
    listed = [Path(dep) for dep in STAGES[stage]["deps"] if dep.startswith("pipeline/")]
    run = [modules()[name].relative_to(ROOT) for name in closure(f"pipeline.stages.{stage}") - DISPATCH]
    around = {ROOT / "pipeline" / name / "__init__.py" for name in FLOORS}  # a docstring each

    def below(path: Path, dep: Path) -> bool:
        return path == dep or dep in path.parents

    missing = sorted(str(path) for path in run if not any(below(path, dep) for dep in listed))
    assert not [path for path in missing if ROOT / path not in around], "edit them, and DVC would rerun nothing"
    assert all(any(below(path, dep) for path in run) for dep in listed), "edit them, and DVC would rerun for nothing"


def test_below_generation_nobody_sees_the_whole_experiment():
    """Libraries get the sections that they read: what a function depends on is in its signature."""
    low = [name for name in modules() if room(name) in ("data", "models", "decoding", "evaluation", "training")]
    for name in low:
        nodes = ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8")))
        names = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not names & {"Params", "load_params"}, name
