"""Hydra's entry point: print the composition, or train what it needs and run generate to pareto, for one job or many.

    python -m pipeline sweep --cfg job --resolve                          # what `make params` writes
    python -m pipeline sweep --multirun decoding.temperature=0.7,1.0      # one folder per job
    python -m pipeline sweep --multirun objectives.positivity.beta=0.02,0.1 arm.rank=8,16
    python -m pipeline sweep --multirun experiment=weak_to_strong base=smollm2-10l,smollm2-20l,smollm2-135m

Models and data are made by DVC in a copy of the project, scratch/trained/<digest>, one for all jobs whose options agree
on them. What DVC's cache knows, of the project or of another job, is taken from there and not trained again. Each job
writes its results below Hydra's output directory, and finished rows are shared by all through the row store.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import hydra
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pipeline.config.errors import UserError
from pipeline.config.judges import RewardJudge
from pipeline.config.load import to_params
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import digest

# Sections that the stages up to train and tune do not depend on; of the others each value makes models of its own.
_LATER = ("base", "comparison", "explain", "sweep", "tracking", "weak_to_strong")
_OF_JUDGE = ("confidence", "resamples")  # of held-out accuracies
_OF_DECODING = ("device", "engine")  # of sampled responses

_CONF = Path(__file__).resolve().parents[2] / "conf"


@hydra.main(version_base="1.3", config_path=str(_CONF), config_name="config")
def _run(config: DictConfig) -> None:
    """Train, generate and judge one composed configuration."""
    from pipeline.config.errors import guard
    from pipeline.stages import explain, generate, judge, pareto  # torch only when there is work to do

    job, project = Path(HydraConfig.get().runtime.output_dir), Workspace()
    with guard():
        params = to_params(config)
        options = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
        copy = project.scratch / "trained" / training_digest(options)
        with holding(copy):
            train(params, options, copy)
        results = copy / "results"
        params = judged_by_copies(params, copy)
        workspace = Workspace(models=copy / "models", results=job, scratch=project.scratch)
        generate.run(params, workspace, prompts=results / "prepare" / "prompts.jsonl")
        explain.run(params, workspace)
        judge.run(params, workspace, prepared=results)
        pareto.run(params, workspace, trained=results)


def training_digest(options: dict[str, Any]) -> str:
    """What tells jobs apart whose models or data differ (16 hex digits).

    Args:
        options: the sections of params.yaml, resolved.
    """
    kept = {name: value for name, value in options.items() if name not in _LATER}
    kept["judge"] = {name: options["judge"][name] for name in _OF_JUDGE}
    kept["decoding"] = {name: options["decoding"][name] for name in _OF_DECODING}
    kept["models"] = {name: options["models"][name] for name in sorted(set(options["fetch"]))}
    kept["inputs"] = {name: options["inputs"][name] for name in ("fetch", "distil", "train")}
    return digest(kept)[:16]


def judged_by_copies(params: Params, copy: Path) -> Params:
    """The experiment with reward models that were trained here where the copy has them."""
    if not isinstance(params.judge, RewardJudge):
        return params
    specs = {
        name: replace(spec, location=str(copy / spec.location))
        if spec.source == "path" and Path(spec.location).parts[:1] == ("models",)
        else spec
        for name, spec in params.judge.models.items()
    }
    return replace(params, judge=replace(params.judge, models=specs))


@contextmanager
def holding(copy: Path) -> Iterator[None]:
    """Wait for other jobs that need the same models: the first trains them, the others find them."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{copy}.lock"):
        yield


def train(params: Params, options: dict[str, Any], copy: Path) -> None:
    """Bring a copy of the project up to date: models, data, ARMs, and what is tuned for comparison.

    Args:
        params: the experiment.
        options: the same, as params.yaml has them.
        copy: the folder; it is made, or goes on as it is.

    Raises:
        UserError: a stage failed, whose own words are above.
    """
    prepare_copy(params, options, copy)
    distilled = ["distil"] if options["inputs"]["distil"] else []
    tuned = ["tune"] if params.tune.bases and params.tune.rivals else []
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "dvc", "repro", "fetch", *distilled, "train", *tuned]
    done = subprocess.run(command, cwd=copy, env={**os.environ, "PATH": path}, check=False)
    if done.returncode:
        raise UserError(f"{copy}: a stage failed, see above: mend what it says and run the same command again.")


def prepare_copy(params: Params, options: dict[str, Any], copy: Path) -> None:
    """Write what DVC needs to run the stages in a copy that shares the project's cache and finished rows."""
    here = Path.cwd()
    (copy / ".dvc").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(copy / "pipeline", ignore_errors=True)  # what was removed from the project since then
    shutil.copytree("pipeline", copy / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("dvc.yaml", ".dvcignore"):  # with other files ignored, folders would have other digests
        shutil.copy2(file, copy)
    (copy / "params.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(options)), encoding="utf-8")
    settings = {
        "core": {"no_scm": "true", "analytics": "false"},
        "cache": {"dir": str(here / ".dvc" / "cache"), "type": "reflink,symlink,copy"},
    }
    lines = [f"[{section}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for section, of in settings.items()]
    (copy / ".dvc" / "config").write_text("".join(lines), encoding="utf-8")
    files = {options["data"]["path"], options["data"]["prompts"]}
    for entry in [entry for stage in ("fetch", "distil", "train") for entry in options["inputs"][stage].values()]:
        files |= {value for name, value in entry.items() if name in ("source", "prompts", "pretrained")}
    made = [one.folder for one in params.data.download]
    outside = [file for file in files if not any(Path(file).is_relative_to(folder) for folder in made)]
    (here / "scratch" / "store").mkdir(parents=True, exist_ok=True)
    for file in ["scratch/store", *sorted(outside)]:
        if not (copy / file).exists() and (here / file).exists():  # an absolute path is there already
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).symlink_to(here / file)


def main(arguments: Sequence[str]) -> None:
    """Hand the arguments to Hydra, which reads them from `sys.argv`."""
    sys.argv = ["python -m pipeline sweep", *arguments]
    _run()
