"""The only file that knows Weights & Biases: offline unless asked, no account, no network, no prompt.

W&B shows what the stages wrote; no stage reads anything back from it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import wandb

from pipeline.config.errors import UserError
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row, digest

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

    from pipeline.training.fit import Job


def _settings(params: Params, workspace: Workspace) -> dict[str, Any]:
    """Arguments of `wandb.init` that every run shares.

    Raises:
        UserError: online mode without a key in the environment.
    """
    tracking = params.tracking
    if tracking.mode == "online":
        _key()
    folder = workspace.scratch.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "project": tracking.project,
        "entity": tracking.entity,
        "mode": tracking.mode,
        "dir": str(folder),
        "settings": wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, disable_code=True),
    }


def _key() -> None:
    if not os.environ.get("WANDB_API_KEY"):
        raise UserError("tracking is online, but WANDB_API_KEY is not set: export it, or use tracking=offline.")


def _check_written(run: Any) -> None:
    """Refuse an offline run that is not whole on disk: W&B drops what finds no room and only logs that.

    Raises:
        OSError: the disk is full.
    """
    if run.settings.mode != "offline":
        return
    log = Path(run.settings.log_internal)
    full = shutil.disk_usage(log.parent).free == 0
    if full or "no space left" in log.read_text(encoding="utf-8", errors="replace"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), run.settings.sync_file)


@contextmanager
def training_logger(params: Params, job: Job, stage: str, workspace: Workspace) -> Iterator[WandbLogger | bool]:
    """A Lightning logger for one ARM's training, finished on leaving; False where tracking is disabled.

    Of several processes that train together only the first has one.
    """
    from lightning.pytorch.loggers import WandbLogger  # seconds to import, and only training needs them
    from lightning.pytorch.utilities import rank_zero_only

    if params.tracking.mode == "disabled" or getattr(rank_zero_only, "rank", 0) > 0:
        yield False
        return
    config = {
        "objectives": {name: {"beta": beta, "weight": weight} for name, (beta, weight) in job.terms.items()},
        "kind": job.kind,
        "base": job.start,
        "seed": job.seed,
        "arm": asdict(job.arm),
        "loss": asdict(job.loss),
        "trainer": asdict(job.trainer),
    }
    shared = _settings(params, workspace)
    run = wandb.init(**shared, name=f"{stage}-{job.name}", job_type=stage, config=config)
    try:
        yield WandbLogger(experiment=run, log_model=False)
    finally:
        run.finish()
    _check_written(run)


def log_points(params: Params, workspace: Workspace, group: str, points: Sequence[Row], samples: pd.DataFrame) -> None:
    """One run per line of the front: its weights as config, its scores as summary, its texts as a table.

    Args:
        group: what the runs have in common, shown as their group.
        points: lines of front.csv.
        samples: judged rows, each with `point`, `prompt`, `response` and a score per objective.
    """
    if params.tracking.mode == "disabled":
        return
    shared = _settings(params, workspace)
    for line in points:
        point = line["point"]
        inputs = {key: value for key, value in line.items() if key in ("method", "base") or key.startswith("alpha_")}
        config = {"point": point, "seed": params.seed, **inputs}
        run = wandb.init(**shared, name=point, group=group, job_type="pareto", config=config, reinit="finish_previous")
        run.summary.update({key: value for key, value in line.items() if isinstance(value, bool | int | float)})
        columns = ["prompt", "response", *params.objectives, "kl"]
        shown = samples.loc[samples.point == point, columns]
        run.log({"samples": wandb.Table(columns=list(columns), data=shown.to_numpy(dtype=object).tolist())})
        run.finish()
        _check_written(run)


def group_of(params: Params, responses: Sequence[str]) -> str:
    """What the runs of one sweep have in common: the base, and a digest of what was generated."""
    return f"{params.base}-{digest(list(responses))[:8]}"


def publish_report(params: Params, group: str, baseline: str | None = None) -> str:
    """Build the Pareto report in W&B, whose address is returned.

    Front as scatter, weights and scores as parallel coordinates, samples, and what else the runs say of themselves; a
    report shows runs that are in W&B, so those of an offline group have to be synchronised first.

    Args:
        params: the experiment.
        group: of the runs, as `log_points` wrote them.
        baseline: a group to compare with.

    Raises:
        UserError: there is no key, wandb-workspaces is not installed, or W&B refuses.
    """
    _key()
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError as error:
        raise UserError("the W&B report needs wandb-workspaces: pip install wandb-workspaces.") from error
    project, objectives = params.tracking.project, list(params.objectives)
    scores: list[Any] = [reports.SummaryMetric(f"score_{name}") for name in objectives]
    weights: list[Any] = [reports.Config(f"alpha_{name}") for name in objectives]
    distance = reports.SummaryMetric("kl")
    panels: list[Any] = [
        *(
            reports.ScatterPlot(title=f"{x.name} and {y.name}", x=x, y=y, z=distance)
            for x, y in combinations(scores, 2)
        ),
        *(reports.ScatterPlot(title=f"{score.name} against KL", x=distance, y=score) for score in scores),
        reports.ParallelCoordinatesPlot(
            title="weights and what they bring",
            columns=[reports.ParallelCoordinatesPlotColumn(metric=one) for one in (*weights, *scores, distance)],
        ),
        reports.WeavePanelSummaryTable(table_name="samples"),
        reports.RunComparer(),
    ]
    try:
        entity = params.tracking.entity or str(wandb.Api().default_entity)
        runsets = [
            reports.Runset(entity=entity, project=project, name=name, filters=f"Group == '{name}'")
            for name in (group, *([baseline] if baseline else []))
        ]
        report = reports.Report(
            project=project, entity=entity, title=f"Pareto front: {' and '.join(objectives)} on {params.base}",
            description=f"Runs of the group {group}" + (f" beside {baseline}" if baseline else ""),
            blocks=[reports.PanelGrid(runsets=runsets, panels=panels)],
        )  # fmt: skip
        report.save()
    except Exception as error:  # the library raises bare exceptions
        raise UserError(f"W&B refused the report: {error}") from error
    return str(report.url)
