"""What GenARM is compared with, one file per method.

Those that are sampled from like an ARM say a `Law`, which `GuidedDecoder` decodes: `law(mix, place)` in each file.
Those that search with reward models over texts are decoders with its face: `generate(requests)` yields generations.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace


@dataclass(frozen=True)
class Place:
    """Where a method finds what was trained, and writes what it makes of it."""

    params: Params
    workspace: Workspace

    def rival(self, name: str) -> Path:
        """The folder of what was trained for comparison on the base."""
        return self.workspace.rival(self.params.base, name)

    @property
    def derived(self) -> Path:
        """A folder for adapters made of others."""
        return self.workspace.scratch / "adapters" / self.params.base


@dataclass(frozen=True)
class Law:
    """What is sampled from."""

    weights: Mapping[str, float]  # exponents by lane, as in a request
    adapters: Mapping[str, Path] = field(default_factory=dict)  # folders of lanes that are no ARMs
    trained: Collection[Path] = ()  # what had to be trained for it
