"""The only file that knows Weights & Biases: offline unless asked, no account, no network, no prompt.

W&B shows what the stages wrote; no stage reads anything back from it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from pipeline.config import Params, UserError, Workspace
from pipeline.store import Row
from pipeline.training import Job


def _settings(params: Params, workspace: Workspace) -> dict[str, Any]:
    """Arguments of `wandb.init` that every run shares.

    Raises:
        UserError: online mode without a key in the environment.
    """
    tracking = params.tracking
    if tracking.mode == "online" and not os.environ.get("WANDB_API_KEY"):
        raise UserError("tracking.mode is online, but WANDB_API_KEY is not set: export it, or use tracking=offline.")
    folder = workspace.scratch.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "project": tracking.project,
        "entity": tracking.entity,
        "mode": tracking.mode,
        "dir": str(folder),
        "settings": wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, disable_code=True),
    }


@contextmanager
def training_logger(params: Params, job: Job, stage: str, workspace: Workspace) -> Iterator[WandbLogger | bool]:
    """A Lightning logger for one ARM's training, finished on leaving; False where tracking is disabled.

    Of several processes that train together only the first has one.
    """
    if params.tracking.mode == "disabled" or getattr(rank_zero_only, "rank", 0) > 0:
        yield False
        return
    config = {
        "objectives": {name: {"beta": beta, "weight": weight} for name, (beta, weight) in job.pulls.items()},
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


def log_points(params: Params, workspace: Workspace, group: str, points: Sequence[Row], samples: Sequence[Row]) -> None:
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
        mine = [row for row in samples if row["point"] == point]
        columns = ["prompt", "response", *params.objectives, "kl"]
        run.log({"samples": wandb.Table(columns=list(columns), data=[[row[name] for name in columns] for row in mine])})
        run.finish()
