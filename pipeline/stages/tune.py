"""tune: what guidance saves, done for comparison: a base tuned for an objective (DPO), models/policies/<base>/."""

import sys

from pipeline.config import Params, Workspace
from pipeline.stages import main
from pipeline.stages.train import produce
from pipeline.training import Job


def run(params: Params, workspace: Workspace, base: str, objective: str) -> None:
    """Tune one base for one objective; write its adapter and results/tune/<base>/<objective>/."""
    job = Job.of_policy(params, workspace, objective, base)
    out = workspace.results / "tune" / base / objective
    produce(params, workspace, job, "tune", workspace.policy(base, objective), out)


if __name__ == "__main__":
    main(run, *sys.argv[1:])
