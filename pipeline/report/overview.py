"""Where to look at the results; with --tracking online, the Pareto report in W&B of the runs that are there.

python -m pipeline report
wandb sync scratch/wandb/offline-run-*                                     # once, where tracking was offline
python -m pipeline report --tracking online --baseline smollm2-135m-1f0e9a2b     # make report TRACKING=online
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from pipeline.config.errors import UserError
from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace
from pipeline.data.responses import read_generated
from pipeline.report import tracking


def main(arguments: Sequence[str]) -> None:
    """Say where everything is, or publish it."""
    parser = ArgumentParser(
        "python -m pipeline report", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--tracking", choices=["offline", "online"], default="offline")
    parser.add_argument("--baseline", metavar="GROUP", help="another group of runs, to compare with")
    options = parser.parse_args(arguments)
    workspace = Workspace()
    results, offline = workspace.results, sorted(workspace.scratch.glob("wandb/offline-run-*"))
    files = ("report", "report/index.html"), ("front", "pareto/front.csv"), ("picture", "pareto/front.png")
    for name, file in files:
        path = results / file
        print(f"{name:8} {path if path.exists() else f'{path} is not there yet: run `make repro`'}")
    print(f"W&B      {len(offline)} offline runs in {workspace.scratch}/wandb: `wandb sync` uploads them")
    scored = results / "judge" / "scores.jsonl"
    if not scored.exists():
        if options.tracking == "online":
            raise UserError(f"{scored} is missing: run `make repro`, or `dvc pull`.")
        return
    params = load_params()
    group = tracking.group_of(params, [row.response for row in read_generated(scored)])
    print(f"group    {group}")
    if options.tracking == "online":
        print(f"online   {tracking.publish_report(params, group, options.baseline)}")
