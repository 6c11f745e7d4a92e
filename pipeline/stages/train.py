"""train: one ARM per objective as a PEFT folder or a model of its own, its held-out accuracy and its curve.

python -m pipeline train --objective positivity
python -m pipeline train --objective all         # with arm.kind parm or uniarm: one ARM for all mixes
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from pipeline.config.errors import UserError
from pipeline.config.inputs import ALL
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import digest, file_digest, read_jsonl, replacing, write_json
from pipeline.evaluation.statistics import Bootstrap
from pipeline.models.loading import Source, model_digest
from pipeline.report import tracking
from pipeline.training import export, hub
from pipeline.training.arm import CURVE
from pipeline.training.fit import Job, train


def run(params: Params, workspace: Workspace, objective: str) -> None:
    """Train the ARM of one objective; write models/arms/<objective> and results/train/<objective>/."""
    if params.arm.for_all_mixes and objective != ALL:
        raise UserError(f"arm.kind {params.arm.kind} trains all objectives together: train --objective {ALL}.")
    if not params.arm.for_all_mixes and objective not in params.objectives:
        raise UserError(f"there is no objective {objective}: choose one of {', '.join(params.objectives)}.")
    job, out = arm_job(params, workspace, objective), workspace.results / "train" / objective
    if params.arm.for_all_mixes:
        produce(params, workspace, job, "train", workspace.arms, out)
        return
    pretrained = params.objectives[objective].pretrained
    if pretrained is None:
        produce(params, workspace, job, "train", workspace.arm(objective), out)
        return
    pairs = [row for _, row in read_jsonl(workspace.results / "prepare" / "pairs" / f"{objective}.jsonl")]
    held_out = hub.adopt(job, pretrained, pairs, workspace.arm(objective))
    with replacing(out / "curve.csv") as stream:
        pd.DataFrame(columns=CURVE).to_csv(stream, index=False)
    write_json(out / "metrics.json", export.metrics(held_out))
    print(f"train: {objective}: {held_out.accuracy}, as it came from {pretrained.location}")


def arm_job(params: Params, workspace: Workspace, objective: str) -> Job:
    """The training of an objective's ARM, or of the one for all mixes."""
    source = Source.of(params.models, workspace, params.arm.base)
    if params.arm.quantisation is not None:
        source = replace(source, quantisation=params.arm.quantisation)
    own = params.objectives if params.arm.for_all_mixes else [objective]
    terms = {name: (params.objectives[name].beta, 1.0) for name in own}
    kind = "arm" if params.arm.kind == "separate" else params.arm.kind
    return Job(
        objective, kind, terms, params.arm.base, source, params.arm, params.loss, params.trainer, params.seed,
        Bootstrap.of(params.judge, params.seed),
    )  # fmt: skip


def produce(params: Params, workspace: Workspace, job: Job, stage: str, folder: Path, out: Path) -> None:
    """Train a job on its objective's pairs; write the model to `folder`, metrics and curve to `out`."""
    started = time.monotonic()
    files = [workspace.results / "prepare" / "pairs" / f"{objective}.jsonl" for objective in job.terms]
    rows = [{**row, "objective": place} for place, file in enumerate(files) for _, row in read_jsonl(file)]
    digests = {"base digest": model_digest(job.source.folder), "pairs digest": file_digest(*files)}
    with tracking.training_logger(params, job, stage, workspace) as logger:
        trained = train(job, rows, digest(digests), workspace.scratch, logger)
    if trained is None:  # another process writes
        return
    with replacing(out / "curve.csv") as stream:
        pd.DataFrame(trained.history).to_csv(stream, index=False)
    card = export.model_card(job, params.models[job.start].license, digests, trained)
    export.save(trained.model, job.source.prompter().tokenizer, folder, job.start, card, trained.held_out)
    write_json(out / "metrics.json", export.metrics(trained.held_out, trained, job.trainer.epochs))
    shutil.rmtree(trained.checkpoints, ignore_errors=True)
    took = time.monotonic() - started
    print(f"{stage}: {out.name}: {trained.held_out.accuracy} after {trained.steps} steps, {took:.0f} s")
