"""The recipes of CONTRIBUTING.md, each followed in a copy of the project."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.tiny import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
USES = {
    "Add an objective": """
from pipeline.data.oracles import scorer
assert (scorer("curiosity")("Why?"), scorer("curiosity")("No.")) == (1.0, 0.0)
assert load_params().sweep.points["c100"].weights == {"curiosity": 1.0}
""",
    "Add a method": """
from pipeline.config.points import Mix
from pipeline.config.workspace import Workspace
from pipeline.generation.methods import Place
from pipeline.generation.methods.compared_method import _law
params = load_params()
place = Place(params, Workspace(), params.base)
law = _law(params.comparison.methods["half"], Mix("p", {"positivity": 0.5}, 1.0), place)
assert law.weights == {"positivity": 0.25} and [folder.name for folder in law.trained] == ["positivity"]
""",
    "Add a judge": """
from pipeline.evaluation.judges.rubric import read_rubric
judge = load_params().judge
assert (judge.kind, judge.model, judge.api_key_env, judge.max_calls) == ("llm", "my-judge", "HOUSE_KEY", 500)
assert "Which response is kinder?" in str(read_rubric(judge.rubrics["positivity"]))
""",
}


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, flags=re.DOTALL | re.MULTILINE).group(1)


def follow(recipe, folder):
    """Make the changes of a recipe's blocks; return its commands."""
    commands = []
    for language, block in re.findall(r"```(\w+)\n(.*?)```", recipe, flags=re.DOTALL):
        if language == "bash":
            commands += block.splitlines()
            continue
        head, _, body = block.partition("\n")
        path = folder / re.sub(r"^(#|---|<!--) | -->$", "", head)
        if language == "diff":
            lines = body.splitlines(keepends=True)
            old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
            new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
            text = path.read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{path.name} no longer has\n{old}"
            path.write_text(text.replace(old, new), encoding="utf-8")
        else:
            assert not path.exists(), f"{path.name} is there already"
            path.write_text(body, encoding="utf-8")
    return commands


def test_every_recipe_is_followed():
    assert re.findall(r"^## (.*)$", TEXT, flags=re.MULTILINE) == list(USES)


@pytest.mark.parametrize("title", USES)
def test_a_recipe_gives_what_it_promises(title, tmp_path):
    for name in ("pipeline", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (command,) = follow(section(title), tmp_path)
    overrides = shlex.split(re.search(r'make params ARGS="(.*?)" && dvc repro$', command)[1])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def python(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    composed = python("-m", "pipeline", "sweep", "--cfg", "job", "--resolve", *overrides)
    (tmp_path / "params.yaml").write_text(composed, encoding="utf-8")
    python("-c", "from pipeline import load_params\n" + USES[title])


def test_commands_that_run_tests_name_tests_that_are_there():
    commands = re.findall(r"^python -m pytest (\S+)(?: -k (\S+))?", TEXT, flags=re.MULTILINE)
    assert len(commands) == 2
    for file, word in commands:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def test_\w*{word}", text, flags=re.MULTILINE)
