"""The adapters of lanes as vLLM knows them: by a number and a folder each.

A lane that is a mixture of several (`pipeline.models.mixtures`) is merged into an adapter of its own when a request
first asks for it. vLLM loads what a scheduled lane names into a free slot, or into that of an adapter which is no
longer in use; lanes for which there is none wait, and with them their group. What is merged has a number by its
content, so that several servers of one engine mean the same by it.
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vllm.lora.request import LoRARequest

from pipeline.config.points import BASE
from pipeline.data.files import digest
from pipeline.decoding.backbone import SideBackbone
from pipeline.decoding.request import Request
from pipeline.models.identity import folder_identity
from pipeline.models.mixtures import lanes_of_weights, merge, mixtures_of, shares_of

_MERGED = 1 << 30  # a bit of their numbers, of which there are 31; what is merged by nobody counts from 1
_KEPT = 64  # merged adapters that stay on the disk though nobody uses them


class Adapters:
    """Adapters by lane; those of mixtures are made as they are asked for.

    Args:
        adapters: those that are there, by name.
        beside: models beside the engine, whose adapters may be of mixtures too.
    """

    def __init__(self, adapters: Mapping[str, LoRARequest], beside: Sequence[SideBackbone]) -> None:
        self.adapters = dict(adapters)
        self._beside = {name: mixture for side in beside for name, mixture in mixtures_of(side.adapters).items()}
        self._folder = TemporaryDirectory(prefix="mixtures-")
        self._merged: dict[str, LoRARequest] = {}  # by lane
        self._used: Counter[str] = Counter()
        self._mixtures = self._own_mixtures()

    def _own_mixtures(self) -> dict[str, str]:
        return mixtures_of({name: Path(adapter.lora_path) for name, adapter in self.adapters.items()})

    def lanes(self, request: Request) -> tuple[dict[str, float], dict[str, float]]:
        """The lanes of a request and their weights: those inside the engine, the base's first, and those beside it."""
        lanes = lanes_of_weights(request.arms, self._mixtures | self._beside)
        inside = {lane: alpha for lane, alpha in lanes.items() if shares_of(lane, self.adapters)}
        beside = {lane: alpha for lane, alpha in lanes.items() if lane not in inside}
        return {BASE: request.base_weight, **inside}, beside

    def take(self, lane: str) -> None:
        """Say that a lane begins: what is found for it stays until it is given back."""
        self._used[lane] += 1

    def find(self, lane: str) -> LoRARequest | None:
        """The adapter of a lane that was taken, merged if it is a mixture that is not there yet; None of the base's.

        Merging reads and writes whole adapters; another thread may do it.
        """
        if lane == BASE or lane in self.adapters:
            return self.adapters.get(lane)
        if (known := self._merged.get(lane)) is not None:
            return known
        shares = {Path(self.adapters[name].lora_path): share for name, share in shares_of(lane, self.adapters).items()}
        content = digest([[folder_identity(folder), share] for folder, share in shares.items()])
        folder = merge(shares, Path(self._folder.name) / content)
        self._merged[lane] = LoRARequest(lane, _MERGED | int(content[:7], 16), str(folder))
        return self._merged[lane]

    def give_back(self, lane: str) -> None:
        """Say that a lane has ended; of merged adapters that nobody uses the newest are kept."""
        self._used[lane] -= 1
        idle = [name for name in list(self._merged) if not self._used[name]]
        for name in idle[: max(0, len(idle) - _KEPT)]:
            shutil.rmtree(self._merged.pop(name).lora_path)
        self._used += Counter()  # without those at 0

    def fit(self, adapters: Mapping[str, LoRARequest]) -> bool:
        """Whether, with these in the place of those of their names, the same ones are of one mixture as before."""
        after = mixtures_of({name: Path(one.lora_path) for name, one in {**self.adapters, **adapters}.items()})
        return _groups(after) == _groups(self._mixtures)

    def exchange(self, adapters: Mapping[str, LoRARequest]) -> None:
        """Use these in the place of those of their names; no lane is in use."""
        self.adapters |= adapters
        self._mixtures = self._own_mixtures()
        for merged in self._merged.values():
            shutil.rmtree(merged.lora_path)
        self._merged.clear()


def _groups(mixtures: Mapping[str, str]) -> set[frozenset[str]]:
    return {frozenset(name for name in mixtures if mixtures[name] == mixture) for mixture in mixtures.values()}
