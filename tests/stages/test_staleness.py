"""What a stage reads and what DVC reruns it for are the same: read while it runs on a tiny model, stage by stage.

    python -m tests.stages.test_staleness      # writes results/bench/staleness.csv

The table has a line per option (names that users choose are `*`) and a column per stage: `read`, by the stage, and it
reruns; `watched`, reruns without having read it in any of these experiments; nothing where it makes no difference.
"""

import csv
import importlib
import json
import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import networkx
import pytest
import torch
import yaml
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig, LlamaForSequenceClassification

from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace
from pipeline.models.identity import folder_identity
from tests.endpoint import KEY, Server
from tests.tiny import ROOT, tiny_tokenizer, write_tiny
from tests.tracing import NAMES, Trace, Traced

TABLE = ROOT / "results" / "bench" / "staleness.csv"
# What changes how fast a stage is, whether it fits, or what is logged, and nothing that it writes.
NO_DIFFERENCE = ("tracking.", "decoding.batch_size")
FEWER = [f"~{section}.p{mix}" for section in ("tune.rivals", "sweep.points") for mix in ("075_c025", "025_c075")]
REWARDS = [
    "judge=reward_model",
    *(f"judge.models.{name}.location=scratch/rewards" for name in ("positivity", "conciseness")),
]
RLOO = "+tune.rivals.rloo_positivity={kind: rloo, weights: {positivity: 1.0}, beta: 0.1, max_new_tokens: 4, samples: 2}"
EXPERIMENTS = {
    "comparison": ["experiment=smoke_comparison", *FEWER, RLOO],
    "ladder": ["experiment=smoke_weak_to_strong"],
    "local judge": ["experiment=smoke", "judge=local_llm", "judge.card_pairs=2", "judge.least=1.0e-9"],
    "reward models": ["experiment=smoke", *REWARDS],
    "annotators": [
        "experiment=smoke", "+judge@objectives.positivity.annotator=local_llm",
        "objectives.positivity.annotator.least=1.0e-9", "+judge@objectives.conciseness.annotator=reward_model",
        "objectives.conciseness.annotator.models.conciseness.location=scratch/rewards",
    ],
    "endpoint": ["experiment=smoke", "judge=llm", "judge.card_pairs=2"],
    "one ARM for all mixes": ["experiment=smoke", "arm=parm"],
    "own rows and ARM": [
        "experiment=smoke", "data=own", "data.path=scratch/mine.jsonl", "data.sampling=null",
        "objectives.positivity.pretrained={source: path, location: scratch/arm}",
    ],
}  # fmt: skip


@dataclass
class Stage:
    """A stage of DVC in one experiment: what it would rerun for, and what it read."""

    name: str
    params: list[str]
    files: list[str]
    outs: list[str]
    read: Trace
    others: list[str]  # what the other stages write
    digested: list[str] = field(default_factory=list)  # folders whose digest another stage writes to what it depends on
    leaves: set[str] = field(default_factory=set)  # all options of the experiment

    def watches(self, option: str) -> bool:
        """Whether DVC reruns it when that option changes."""
        path = option.removesuffix(f".{NAMES}")
        return any(path == key or path.startswith(f"{key}.") for key in self.params)

    def missed_options(self) -> set[str]:
        """Options that it read, and DVC reruns it for no change of."""
        return {
            option for option in self.read.options if not self.watches(option) and not option.startswith(NO_DIFFERENCE)
        }

    def missed_files(self, before: set[str]) -> set[str]:
        """Files there before, or written by another stage, that it read and DVC does not watch."""
        read = {file for file in self.read.files if file in before or _below(file, self.others)}
        read = {
            file for file in read if not file.endswith((".py", ".pyc"))
        }  # of code tests/test_layers.py sees to that
        return {file for file in read if not _below(file, [*self.files, *self.outs, *self.digested])}


def _below(file, folders):
    return any(file == folder or file.startswith(f"{folder}/") for folder in folders)


def prepared(folder, overrides):
    """A project of dvc.yaml, the composed params.yaml, the package and its files."""
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    write_tiny(folder / "scratch/tiny", context=1024)
    write_tiny(folder / "scratch/arm", seed=1)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder / "scratch/tiny", num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder / "scratch/rewards")
    tiny_tokenizer().save_pretrained(folder / "scratch/rewards")
    labels = {"preferred_positivity": 0, "preferred_conciseness": 1}
    rows = [
        {"prompt": f"Question {n}?", "response_0": "good " * (n % 5 + 1), "response_1": "bad", **labels}
        for n in range(60)
    ]  # fmt: skip
    (folder / "scratch/mine.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = OmegaConf.to_container(compose("config", overrides=overrides), resolve=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(composed, sort_keys=False), encoding="utf-8")


def command_of(stage):
    """The name of the stage that a command runs, and its arguments."""
    python, dash_m, package, name, *words = shlex.split(stage.cmd)
    assert (python, dash_m, package) == ("python", "-m", "pipeline")
    return name, {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def traced_run(folder, monkeypatch):
    """Run every stage in DVC's order in this process; what each one read."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(folder / "site"))
    before = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    stages = []
    with Repo.init(no_scm=True) as repo:
        ordered = list(networkx.topological_sort(repo.index.graph.reverse()))
        outs = {stage.addressing: [out.def_path for out in stage.outs] for stage in ordered}
        for stage in ordered:
            name, arguments = command_of(stage)
            traced, trace = Traced(load_params()), Trace()
            with traced.watching(trace, monkeypatch):
                importlib.import_module(f"pipeline.stages.{name}").run(traced.params, Workspace(), **arguments)
            stages.append(
                Stage(
                    name=stage.addressing,
                    params=[key for dep in stage.deps if isinstance(dep, ParamsDependency) for key in dep.params],
                    files=[dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)],
                    outs=outs[stage.addressing],
                    read=trace,
                    others=[out for name, listed in outs.items() if name != stage.addressing for out in listed],
                    leaves=traced.leaves,
                )
            )
    for stage in stages:
        stage.digested = [
            folder
            for other in stages
            for out in other.outs
            if other is not stage and out.endswith(".json") and _below(out, stage.files)
            for folder in [*other.files, *other.outs]
            if Path(folder).is_dir()
            and json.loads(Path(out).read_text()).get("digest") == folder_identity(Path(folder))
        ]
    return stages, before


def run_experiment(name, folder, patch):
    """The stages of an experiment after they ran in a folder, and the files that were there before."""
    patch.setenv("OPENAI_API_KEY", KEY)
    prepared(folder, [*EXPERIMENTS[name], *([f"judge.base_url={Server().url}"] if name == "endpoint" else [])])
    return traced_run(folder, patch)


def line_of(option):
    """The line of the table that an option is on."""
    sections = r"(models|objectives|sweep\.points|tune\.rivals|comparison\.methods|judge\.models)\.(?!\[)[^.]+"
    line = re.sub(rf"^{sections}", r"\1.*", option)
    return re.sub(r"(annotator\.models)\.(?!\[)[^.]+", r"\1.*", line)


def cells(stages):
    """What the table says of each option and stage of an experiment."""
    found = {}
    for stage in stages:
        column = stage.name.partition("@")[0]
        for option in stage.leaves | stage.read.options:
            if option in stage.read.options:
                found[line_of(option), column] = "read"
            elif stage.watches(option):
                found.setdefault((line_of(option), column), "watched")
    return found


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", params=EXPERIMENTS)
def experiment(request, tmp_path_factory, patch):
    """The folder of an experiment, its stages after they ran, and the files that were there before."""
    folder = tmp_path_factory.mktemp("project")
    return folder, *run_experiment(request.param, folder, patch)


def test_a_stage_reruns_when_an_option_changes_that_it_read(experiment):
    _, stages, _ = experiment
    assert {"prepare", "generate", "judge", "pareto"} <= {stage.name for stage in stages}
    assert all("seed" in stage.read.options for stage in stages if stage.name in ("prepare", "generate"))
    assert not {stage.name: missed for stage in stages if (missed := stage.missed_options())}


def test_a_stage_reruns_when_a_file_changes_that_it_read(experiment):
    _, stages, before = experiment
    assert all(stage.read.files for stage in stages)
    assert not {stage.name: missed for stage in stages if (missed := stage.missed_files(before))}


def test_the_table_says_what_is_read(experiment):
    _, stages, _ = experiment
    with TABLE.open(encoding="utf-8", newline="") as stream:
        table = {(row["option"], stage): said for row in csv.DictReader(stream) for stage, said in row.items()}
    read = {cell for cell, said in cells(stages).items() if said == "read"}
    assert {cell for cell in read if table.get(cell) != "read"} == set(), "run `python -m tests.stages.test_staleness`"


def other(value):
    """Another value of an option's kind, where any will do."""
    return not value if isinstance(value, bool) else value + 1


@pytest.mark.parametrize("experiment", ["reward models"], indirect=True)
def test_dvc_says_so_itself(experiment, monkeypatch):
    """One number of every section is changed, and DVC names the stages that would rerun."""
    folder, stages, _ = experiment
    monkeypatch.chdir(folder)
    config = yaml.safe_load((folder / "params.yaml").read_text())
    with Repo(str(folder)) as repo:
        repo.commit(None, force=True)  # as if DVC had run the stages
    with Repo(str(folder)) as repo:
        assert not repo.status()
    changed = {}
    for option in sorted(set.union(*(stage.leaves for stage in stages))):
        *path, last = option.split(".")
        place = config
        for key in path:
            place = place[key]
        if isinstance(place.get(last), bool | int | float) and option.split(".")[0] not in changed:
            changed[option.split(".")[0]] = option
            before, place[last] = place[last], other(place[last])
            (folder / "params.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            place[last] = before
            with Repo(str(folder)) as repo:
                assert set(repo.status()) == {stage.name for stage in stages if stage.watches(option)}, option
    assert {"seed", "data", "arm", "trainer", "loss", "decoding", "judge", "explain"} <= changed.keys()


def write_table():
    """Run every experiment, and write what was read and what is watched."""
    found = {}
    for name in EXPERIMENTS:
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            stages, _ = run_experiment(name, Path(folder).resolve(), patch)
        for cell, said in cells(stages).items():
            if found.get(cell) != "read":
                found[cell] = said
    columns = list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    with TABLE.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["option", *columns])
        for option in sorted({option for option, _ in found}):
            writer.writerow([option, *(found.get((option, column), "") for column in columns)])


if __name__ == "__main__":
    write_table()
