"""tune: what ARMs are compared with, trained on the same pairs: an adapter of a base, models/arms/rivals/<base>/.

python -m pipeline tune --base smollm2-135m --rival positivity
"""

import shutil

import pandas as pd

from pipeline.config.errors import UserError
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl, replacing, write_json
from pipeline.models.loading import Source
from pipeline.stages.train import produce
from pipeline.training import rloo
from pipeline.training.fit import Job


def run(params: Params, workspace: Workspace, base: str, rival: str) -> None:
    """Train one rival on one base; write its adapter and results/tune/<base>/<rival>/."""
    if rival not in params.tune.rivals:
        raise UserError(f"there is no rival {rival}: choose one of {', '.join(params.tune.rivals) or 'none'}.")
    if params.tune.rivals[rival].kind == "rloo":
        _reinforce(params, workspace, base, rival)
        return
    job = Job.of_rival(params, workspace, base, rival)
    produce(params, workspace, job, "tune", workspace.rival(base, rival), workspace.results / "tune" / base / rival)


def _reinforce(params: Params, workspace: Workspace, base: str, rival: str) -> None:
    source = Source.of(params, workspace, base)
    folder, out = workspace.rival(base, rival), workspace.results / "tune" / base / rival
    scratch = workspace.scratch / "train" / f"rloo-{base}-{rival}"
    pairs = workspace.results / "prepare" / "pairs"
    rows = [
        row for objective in params.tune.rivals[rival].weights for _, row in read_jsonl(pairs / f"{objective}.jsonl")
    ]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows if row["split"] == "train"))
    history, tokens = rloo.train(params, params.tune.rivals[rival], source, prompts, scratch, folder)
    with replacing(out / "curve.csv") as stream:
        pd.DataFrame(history).to_csv(stream, index=False)
    write_json(out / "metrics.json", {"steps": history[-1]["step"], "tokens": tokens})
    shutil.rmtree(scratch, ignore_errors=True)
