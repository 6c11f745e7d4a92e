"""Where benchmarks keep what they train, and how they work on several processes."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.generation import comparison
from pipeline.models.loading import resolve_device, resolve_dtype


def workspace_below(folder: Path, *models: str) -> Workspace:
    """A workspace of its own in which these models, the base among them, and the store of rows are the project's."""
    workspace = Workspace(folder / "models", folder / "results", Path("scratch"))
    workspace.models.mkdir(parents=True, exist_ok=True)
    for name in models:
        if not workspace.model(name).exists():
            workspace.model(name).symlink_to(Workspace().model(name).absolute())
    return workspace


@contextmanager
def pool_of(processes: int) -> Iterator[ProcessPoolExecutor]:
    """So many fresh processes; on a GPU small models leave most of it idle, and several share it well."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield pool


def timed(work: Callable[..., object], *arguments: Any) -> float:
    """Seconds that something takes."""
    started = time.monotonic()
    work(*arguments)
    return round(time.monotonic() - started, 1)


def trained(jobs: Mapping[str, tuple[Callable[..., object], Sequence[Any]]], processes: int) -> dict[str, float]:
    """Trainings as (function, arguments), several at once; seconds of each."""
    with pool_of(processes) as pool:
        futures = {name: pool.submit(timed, work, *arguments) for name, (work, arguments) in jobs.items()}
        return {name: future.result() for name, future in futures.items()}


def generate_by_method(params: Params, workspace: Workspace, prompts: Sequence[str], processes: int) -> None:
    """Put the rows of a comparison into the store, a process for each method."""
    methods = params.comparison.methods
    alone = [replace(params, comparison=replace(params.comparison, methods={name: methods[name]})) for name in methods]
    with pool_of(processes) as pool:
        for future in [pool.submit(_generate, own, workspace, prompts) for own in alone]:
            future.result()


def _generate(params: Params, workspace: Workspace, prompts: Sequence[str]) -> None:
    comparison.generate(params, workspace, prompts, comparison.open_comparing_judge(params, workspace))


def machine() -> str:
    """What it ran on, and in which precision models are there: figures of two precisions are those of two runs."""
    device = resolve_device("auto")
    name = f"one {torch.cuda.get_device_name()}" if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return f"{name}, {str(resolve_dtype('auto', device)).removeprefix('torch.')}"
