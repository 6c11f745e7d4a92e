"""A dial from two sentences in minutes: sample under both, train an ARM on a reduced number of prompts, and keep it.

    python -m pipeline.dial --name warmth --wanted "Answer warmly." --unwanted "Answer coldly."

The dial lies below scratch/dials/, where no stage reads: `make playground` shows it beside the ARMs of the experiment.
What an interrupted run sampled is in the row store, and what it trained is in checkpoints, so the same command goes on.
"""

import json
import os
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import TypeAdapter

from pipeline.config import Workspace, load_params, to_params
from pipeline.params import Params
from pipeline.store import replacing_folder, write_json

_PROMPTS = Path(__file__).parent / "prompts" / "everyday.jsonl"
_LIMITS: Mapping[Any, int] = {"train": 64, "validation": 8, "test": 16}  # prompts
_RESPONSES, _TOKENS = 2, 40  # under each sentence
# Of the length-normalised loss, which a sentence such as "Answer in one short sentence." does not solve by length.
_OBJECTIVE, _MARGIN = {"beta": 2.0, "pretrained": None}, 1.0


@dataclass(frozen=True)
class DialWorkspace(Workspace):
    """A workspace whose ARM and results lie in a folder of their own; the base and the stores are the project's."""

    folder: Path = Path("dial")

    @classmethod
    def of(cls, workspace: Workspace, folder: Path) -> "DialWorkspace":
        """Below a project's workspace."""
        return cls(workspace.models, folder / "results", workspace.scratch, folder)

    def arm(self, objective: str) -> Path:
        """The dial's only ARM."""
        return self.folder / "arm"

    @property
    def classifiers(self) -> Path:
        """As in a project's workspace."""
        return self.folder / "classifiers.json"


@dataclass(frozen=True)
class Dial:
    """A finished dial."""

    name: str
    wanted: str
    unwanted: str
    base: str  # the model whose adapter it is
    verdict: str  # of the data card
    accuracy: float | None  # on held-out pairs
    seconds: float
    arm: Path


def dials_folder(workspace: Workspace) -> Path:
    """Where dials are kept."""
    return workspace.scratch / "dials"


def finished_dials(workspace: Workspace) -> list[Dial]:
    """The dials that are there, oldest first."""
    files = sorted(dials_folder(workspace).glob("*/dial.json"), key=lambda file: file.stat().st_mtime)
    return [Dial(**json.loads(file.read_text(encoding="utf-8")), arm=file.parent / "arm") for file in files]


def dial_params(params: Params, name: str, wanted: str, unwanted: str) -> Params:
    """The experiment with that objective alone, on few prompts and with the length-normalised loss.

    Raises:
        UserError: the sentences are empty or equal, or the name cannot be one.
    """
    sampled = params.data.sampling is not None  # then the data are prompts
    path = params.data.path if sampled else str(_PROMPTS)
    base = params.arm.base
    changes: dict[str, Any] = {
        "fetch": [base],
        "base": base,
        "objectives": {name: {"label": f"preferred_{name}", "wanted": wanted, "unwanted": unwanted} | _OBJECTIVE},
        "data": {
            "path": path, "prompts": path, "sampler": base, "download": [], "limits": _LIMITS,
            "sampling": {"responses_per_prompt": _RESPONSES, "max_new_tokens": _TOKENS},
            "columns": dict(params.data.columns) if sampled else {},
        },
        "loss": {"kind": "simpo", "margin": _MARGIN},
        "sweep": {"control": "base", "points": {"base": {}}},
        "tune": {"bases": [], "rivals": {}},
        "comparison": {"bases": [], "methods": {}},
        "weak_to_strong": {"name": "weak_to_strong", "weak": [], "bases": []},
        "judge": {"kind": "oracle"} | {key: getattr(params.judge, key) for key in ("confidence", "resamples")},
        "tracking": {"mode": "disabled"},
    }  # fmt: skip
    config = OmegaConf.create(json.loads(TypeAdapter(Params).dump_json(params)) | changes)
    return to_params(config, "the dial")


def make_dial(params: Params, workspace: Workspace, name: str, wanted: str, unwanted: str) -> Dial:
    """Sample, contrast and train; a dial of that name is replaced once the new one is finished.

    Raises:
        UserError: the sentences yield too few pairs, or something the stages refuse.
    """
    from pipeline.stages import prepare, train  # which load torch

    started, own = time.monotonic(), dial_params(params, name, wanted, unwanted)
    folder = dials_folder(workspace) / name
    with replacing_folder(folder) as partial:
        place = DialWorkspace.of(workspace, partial)
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


def main() -> None:
    """Make one dial of the project in the current folder."""
    parser = ArgumentParser("python -m pipeline.dial", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="a letter, then letters, digits, _ and -")
    parser.add_argument("--wanted", required=True, help="the sentence that the dial turns towards")
    parser.add_argument("--unwanted", required=True, help="the sentence that it turns away from")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    dial = make_dial(load_params(), Workspace(), given.name, given.wanted, given.unwanted)
    print(f"dial: {dial.name}: held-out accuracy {dial.accuracy}, {dial.seconds:.0f} s, {dial.arm}")


if __name__ == "__main__":
    from pipeline.stages import guard

    with guard():
        main()
