"""The folders of a run."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """The folders of a run, each path written once; `dvc.yaml` names the same ones (a test compares)."""

    models: Path = Path("models")
    results: Path = Path("results")
    scratch: Path = Path("scratch")  # never an output: checkpoints, row stores, W&B's files

    def model(self, name: str) -> Path:
        """The folder of a fetched model."""
        return self.models / name

    @property
    def arms(self) -> Path:
        """The folder of the objectives' ARMs."""
        return self.models / "arms"

    def arm(self, objective: str) -> Path:
        """The folder of an objective's ARM: a PEFT adapter, or a model of its own."""
        return self.arms / objective

    @property
    def classifiers(self) -> Path:
        """The file of the classifiers that tell responses to two sentences apart, by objective."""
        return self.models / "classifiers.json"

    def rival(self, base: str, name: str) -> Path:
        """The folder of what was trained for comparison."""
        return self.models / "rivals" / base / name
