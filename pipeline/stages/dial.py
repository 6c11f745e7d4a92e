"""A dial from two sentences in minutes: sample under both, train an ARM on a reduced number of prompts, and keep it.

    python -m pipeline dial --name warmth --wanted "Answer warmly." --unwanted "Answer coldly."

The dial lies below scratch/dials/, where no other stage reads: `make playground` shows it beside the ARMs of the
experiment. What an interrupted run sampled is in the row store, and what it trained in checkpoints, so the same command
goes on.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import replacing_folder, write_json
from pipeline.report.dials import Dial, dial_params, dials_folder
from pipeline.stages import prepare, run_stage, train


@dataclass(frozen=True)
class _DialWorkspace(Workspace):
    """A workspace whose ARM and results lie in a folder of their own; the base and the stores are the project's."""

    folder: Path = Path("dial")

    @classmethod
    def of(cls, workspace: Workspace, folder: Path) -> "_DialWorkspace":
        """Below a project's workspace."""
        return cls(workspace.models, folder / "results", workspace.scratch, folder)

    def arm(self, objective: str) -> Path:
        """The dial's only ARM."""
        return self.folder / "arm"

    @property
    def classifiers(self) -> Path:
        """As in a project's workspace."""
        return self.folder / "classifiers.json"


def make_dial(params: Params, workspace: Workspace, name: str, wanted: str, unwanted: str) -> Dial:
    """Sample, contrast and train; a dial of that name is replaced once the new one is finished.

    Raises:
        UserError: the sentences yield too few pairs, or something the stages refuse.
    """
    started, own = time.monotonic(), dial_params(params, name, wanted, unwanted)
    folder = dials_folder(workspace) / name
    with replacing_folder(folder) as partial:
        place = _DialWorkspace.of(workspace, partial)
        prepare.run(own, place)
        train.run(own, place, name)
        card = json.loads((place.results / "prepare" / "data_card.json").read_text(encoding="utf-8"))
        metrics = json.loads((place.results / "train" / name / "metrics.json").read_text(encoding="utf-8"))
        dial = Dial(
            name, wanted, unwanted, own.arm.base, card["objectives"][name]["verdict"], metrics["accuracy"],
            round(time.monotonic() - started, 1), folder / "arm",
        )  # fmt: skip
        write_json(partial / "dial.json", {key: value for key, value in vars(dial).items() if key != "arm"})
    return dial


def run(params: Params, workspace: Workspace, name: str, wanted: str, unwanted: str) -> None:
    """Make one dial of the project in the current folder."""
    dial = make_dial(params, workspace, name, wanted, unwanted)
    print(f"dial: {dial.name}: held-out accuracy {dial.accuracy}, {dial.seconds:.0f} s, {dial.arm}")


def main(arguments: Sequence[str]) -> None:
    """Make the dial that the command line describes."""
    run_stage("dial", arguments)
