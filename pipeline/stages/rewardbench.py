"""Accuracy of an ARM as a reward model, on pairs in the columns of RewardBench (arXiv 2403.13787).

    python -m pipeline rewardbench reward-bench.parquet --objective helpfulness --out results/rewardbench.csv

The file (JSON Lines, JSON, Parquet or CSV) has the columns `prompt`, `chosen`, `rejected` and perhaps `subset`. A pair
is right where the chosen response has the higher reward, by three rewards of the same ARM: `sum`, log π_r(y|x), which
is GenARM's; `mean`, the same per token; `ratio`, log π_r(y|x) − log π_start(y|x), DPO's implicit reward with the model
that the ARM was made from as the reference. Beside the accuracy stand what always taking the longer response scores,
and the accuracy on pairs of like length.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.config.errors import UserError
from pipeline.config.load import load_params
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import replacing
from pipeline.evaluation.statistics import Bootstrap
from pipeline.models.loading import Source
from pipeline.training.held_out import HeldOut
from pipeline.training.rewardbench import accuracies, frame_of


def scored(params: Params, workspace: Workspace, objective: str, path: Path) -> dict[tuple[str, str], HeldOut]:
    """What the ARM of an objective makes of the pairs of a file, by subset and reward.

    Raises:
        UserError: there is no such objective, its ARM is not there, or the file is not one of pairs.
    """
    if objective not in params.objectives:
        raise UserError(f"--objective {objective}: params.yaml has the objectives {', '.join(params.objectives)}.")
    return accuracies(
        path, workspace.arm(objective), Source.of(params.models, workspace, params.arm.base), params.arm.base,
        params.trainer, Bootstrap.of(params.judge, params.seed), params.objectives[objective].pretrained,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Score a file by the ARM of an objective."""
    parser = ArgumentParser(
        "python -m pipeline rewardbench", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--objective", required=True, help="whose ARM: models/arms/<objective>")
    parser.add_argument("--out", type=Path, help="a CSV file for the table")
    options = parser.parse_args(arguments)
    found = scored(load_params(), Workspace(), options.objective, options.file)
    shown = Table("subset", "reward", "right", "right at like length", "the longer one is right")
    for (subset, kind), line in found.items():
        shown.add_row(subset, kind, str(line.accuracy), str(line.length_matched), str(line.chosen_longer))
    Console().print(shown)
    if options.out:
        with replacing(options.out) as stream:
            frame_of(found).to_csv(stream, index=False)
