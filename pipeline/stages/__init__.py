"""One file per DVC stage: load params, load files, call the library, write files.

python -m pipeline train --objective positivity      # what `dvc repro` runs, from the project's folder
"""

import logging
import os
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace


def share_store(here: Path) -> None:
    """Let a copy of the project that `dvc exp run --temp` or `--queue` works in use the project's own finished rows.

    DVC copies tracked files below .dvc/tmp/exps, where scratch/ would start empty and be deleted with the copy.
    """
    project = next((up.parents[2] for up in here.parents if up.parts[-3:] == (".dvc", "tmp", "exps")), None)
    store = here / "scratch" / "store"
    if project is None or store.exists():
        return
    (project / "scratch" / "store").mkdir(parents=True, exist_ok=True)
    store.parent.mkdir(exist_ok=True)
    store.symlink_to(project / "scratch" / "store")


def run_stage(name: str, arguments: Sequence[str]) -> None:
    """Run a stage on params.yaml in the current folder.

    Args:
        name: of the stage, and of its module here.
        arguments: of the command line: the names that the stage's `run` takes.
    """
    module = import_module(f"pipeline.stages.{name}")
    parser = ArgumentParser(
        f"python -m pipeline {name}", description=module.__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    for parameter in signature(module.run).parameters.values():
        if parameter.annotation is str:
            parser.add_argument(f"--{parameter.name}", required=True)
        elif parameter.annotation == str | None:
            parser.add_argument(parameter.name, nargs="?")
    options = vars(parser.parse_args(arguments))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for library in ("lightning", "peft", "transformers"):  # their advice is for developers, not for who runs the stage
        warnings.filterwarnings("ignore", module=library)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    params = load_params()
    share_store(Path.cwd())
    module.run(params, Workspace(), **options)
