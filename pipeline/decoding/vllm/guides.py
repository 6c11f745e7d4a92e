"""ARMs that are no adapters of the base (weak-to-strong): models of their own beside the engine, a row per group.

They run inside the logits processor, through the same lanes and key-value cache as `GuidedDecoder`'s, on the logits'
device. A second engine would have to be kept in step with the first, token by token across processes; here a row is
wherever its group is, and a group that vLLM preempts is simply read anew. Their memory is theirs: vLLM does not know of
it, so leave it room (`gpu_memory_utilization`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.decoding.backbone import SideBackbone
from pipeline.decoding.kv_cache import BackboneSession
from pipeline.models.loading import Source


def to_json(beside: Sequence[SideBackbone]) -> list[dict[str, Any]]:
    """The guides as JSON, for vLLM to hand to its processes."""
    return [
        {
            "source": asdict(one.source) | {"folder": str(one.source.folder.absolute())},
            "adapters": {name: str(folder.absolute()) for name, folder in one.adapters.items()},
            "name": one.name,
        }
        for one in beside
    ]


def from_json(described: Mapping[str, Any]) -> SideBackbone:
    """One of the models that `to_json` described."""
    source = Source(**{**described["source"], "folder": Path(described["source"]["folder"])})
    adapters = {name: Path(folder) for name, folder in described["adapters"].items()}
    return SideBackbone(source, adapters, described["name"])


@dataclass(frozen=True)
class Guided:
    """A group as its guides see it."""

    name: str
    prompts: Sequence[Sequence[int]]  # per guide: each has its own template
    alphas: Mapping[str, float]  # of the guides' lanes, over the temperature
    output: Sequence[int]  # tokens drawn so far


class Guides:
    """The models, and where each group stands in them."""

    def __init__(self, described: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        backbones = [from_json(one).load(device) for one in described]
        self.vocab_sizes = [backbone.vocab_size for backbone in backbones]
        self._lanes, self._device = [BackboneSession(backbone) for backbone in backbones], device
        self._stands: dict[str, int] = {}  # per group, in the order of rows: the tokens that it has been given
        self._last_G = torch.zeros(0, dtype=torch.long, device=device)
        self._alphas: dict[str, Tensor] = {}

    def order(self, lengths: Mapping[str, int]) -> list[str]:
        """Groups, given the tokens each has drawn, in the order of `admit_rows`: first those that are here."""
        kept = [name for name, stands in self._stands.items() if lengths.get(name) == stands]
        return [*kept, *(name for name in lengths if name not in kept)]

    def admit_rows(self, groups: Sequence[Guided]) -> None:
        """Make these the groups, in `order`; those that are new, or went on while away, are read from the beginning."""
        places = {name: place for place, name in enumerate(self._stands)}
        kept = [group for group in groups if self._stands.get(group.name) == len(group.output)]
        new = groups[len(kept) :]
        for number, lanes in enumerate(self._lanes):
            prompts = [[*group.prompts[number], *group.output] for group in new]
            newcomers = [(place, set(group.alphas)) for place, group in enumerate(new)]
            lanes.admit_rows([places[group.name] for group in kept], prompts, newcomers)
        self._stands = {group.name: len(group.output) for group in groups}
        self._last_G = torch.tensor([group.output[-1] if group.output else 0 for group in groups], device=self._device)
        self._alphas = {
            name: torch.tensor([group.alphas.get(name, 0.0) for group in groups], device=self._device)
            for name in {name for group in groups for name in group.alphas}
        }

    def read(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Let all read the groups' last tokens: per ARM its name, its groups, its α over T there, its logits there."""
        for lanes in self._lanes:
            if lanes.rows:
                lanes.step(self._last_G[:, None])
            for name, rows_g in lanes.rows.items():
                yield name, rows_g, self._alphas[name][rows_g], lanes.logits(name)

    def append(self, tokens_G: Tensor) -> None:
        """Make these the groups' last tokens."""
        self._last_G = tokens_G
        self._stands = {name: stands + 1 for name, stands in self._stands.items()}
