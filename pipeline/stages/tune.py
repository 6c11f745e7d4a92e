"""tune: what ARMs are compared with, trained on the same pairs: an adapter of a base, models/rivals/<base>/.

python -m pipeline tune --base smollm2-135m --rival positivity
"""

import shutil
from dataclasses import replace

import pandas as pd

from pipeline.config.errors import UserError
from pipeline.config.schema import Loss, Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl, replacing, write_json
from pipeline.evaluation.statistics import Bootstrap
from pipeline.models.loading import Source
from pipeline.stages.train import produce
from pipeline.training import rloo
from pipeline.training.fit import Job


def run(params: Params, workspace: Workspace, base: str, rival: str) -> None:
    """Train one rival on one base; write its adapter and results/tune/<base>/<rival>/."""
    if rival not in params.tune.rivals:
        raise UserError(f"there is no rival {rival}: choose one of {', '.join(params.tune.rivals) or 'none'}.")
    job = rival_job(params, workspace, base, rival)
    if job.kind == "rloo":
        _reinforce(params, workspace, job, base, rival)
        return
    produce(params, workspace, job, "tune", workspace.rival(base, rival), workspace.results / "tune" / base / rival)


def rival_job(params: Params, workspace: Workspace, base: str, name: str) -> Job:
    """The training of what `tune.rivals` calls by that name, on a base.

    ARMs for all mixes learn by the ARMs' loss.
    """
    rival = params.tune.rivals[name]
    terms = {
        objective: (params.objectives[objective].beta if rival.beta is None else rival.beta, weight)
        for objective, weight in rival.weights.items()
    }
    arm = replace(params.arm, base=base, tuning="lora", quantisation=None)
    trainer = replace(params.trainer, lr=rival.lr, epochs=rival.epochs)
    loss = params.loss if rival.kind in ("parm", "uniarm") else Loss(kind="dpo" if rival.kind == "dpo" else "arm")
    source, bootstrap = Source.of(params.models, workspace, base), Bootstrap.of(params.judge, params.seed)
    return Job(name, rival.kind, terms, base, source, arm, loss, trainer, params.seed, bootstrap)


def _reinforce(params: Params, workspace: Workspace, job: Job, base: str, rival: str) -> None:
    config = params.tune.rivals[rival]
    scorers = {name: params.objectives[name].scorer for name in config.weights}
    folder, out = workspace.rival(base, rival), workspace.results / "tune" / base / rival
    scratch = workspace.scratch / "train" / f"rloo-{base}-{rival}"
    pairs = workspace.results / "prepare" / "pairs"
    rows = [row for objective in config.weights for _, row in read_jsonl(pairs / f"{objective}.jsonl")]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows if row["split"] == "train"))
    history, tokens = rloo.train(job, config, scorers, prompts, scratch, folder)
    with replacing(out / "curve.csv") as stream:
        pd.DataFrame(history).to_csv(stream, index=False)
    write_json(out / "metrics.json", {"steps": history[-1]["step"], "tokens": tokens})
    shutil.rmtree(scratch, ignore_errors=True)
