"""What GenARM is compared with, one file per method.

Those that are sampled from like an ARM say a `Law`, which `GuidedDecoder` decodes: `law(mix, place)` in each file.
Those that search with reward models over texts are decoders with its face: `generate(requests)` yields generations.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import digest
from pipeline.models.identity import folder_identity


@dataclass(frozen=True)
class Place:
    """Where a method finds what was trained, and writes what it makes of it."""

    params: Params
    workspace: Workspace
    base: str  # the model that is steered

    def rival(self, name: str) -> Path:
        """The folder of what was trained for comparison on the base."""
        return self.workspace.rival(self.base, name)

    def derived(
        self, name: str, sources: Iterable[Path], shares: Mapping[str, float], write: Callable[[Path], object]
    ) -> Path:
        """The folder of an adapter made of others; it is written unless it is there.

        Its path says what it is made of: experiments that run at once share scratch/, and none may find under its
        own name what another has made.

        Args:
            name: of the adapter.
            sources: the folders that it is made of.
            shares: how much each objective counts.
            write: writes it to a folder, whole or not at all.
        """
        origin = digest([[folder_identity(folder) for folder in sources], dict(shares)])[:16]
        target = self.workspace.scratch / "adapters" / self.base / origin / name
        if not target.is_dir():
            write(target)
        return target


@dataclass(frozen=True)
class Law:
    """What is sampled from."""

    weights: Mapping[str, float]  # exponents by lane, as in a request
    adapters: Mapping[str, Path] = field(default_factory=dict)  # folders of lanes that are no ARMs
    trained: Collection[Path] = ()  # what had to be trained for it
