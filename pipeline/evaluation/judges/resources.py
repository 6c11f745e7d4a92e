"""What judges find on this machine: models by name, the row stores, what stage prepare fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Model
from pipeline.config.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.models.loading import Source


@dataclass(frozen=True)
class Resources:
    """What a judge may need beside its configuration."""

    models: Mapping[str, Model]  # those of the run, whether fetched yet or not
    workspace: Workspace
    device: str  # where models compute

    @property
    def store(self) -> Path:
        """The folder of the row stores, which keep what was answered."""
        return self.workspace.scratch / "store"

    def source(self, name: str) -> Source:
        """The model of that name."""
        from pipeline.models.loading import Source  # seconds to import, and a judge without a model does without

        return Source.of(self.models, self.workspace, name)

    def has(self, name: str) -> bool:
        """Whether a model of that name is at hand."""
        return name in self.models and self.workspace.model(name).is_dir()
