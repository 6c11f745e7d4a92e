"""tune: what ARMs are compared with, trained on the same pairs: an adapter of a base, models/arms/rivals/<base>/."""

import sys

from pipeline.config import Params, UserError, Workspace
from pipeline.stages import main
from pipeline.stages.train import produce
from pipeline.training import Job


def run(params: Params, workspace: Workspace, base: str, rival: str) -> None:
    """Train one rival on one base; write its adapter and results/tune/<base>/<rival>/."""
    if rival not in params.tune.rivals:
        raise UserError(f"there is no rival {rival}: choose one of {', '.join(params.tune.rivals) or 'none'}.")
    job = Job.of_rival(params, workspace, base, rival)
    produce(params, workspace, job, "tune", workspace.rival(base, rival), workspace.results / "tune" / base / rival)


if __name__ == "__main__":
    main(run, *sys.argv[1:])
