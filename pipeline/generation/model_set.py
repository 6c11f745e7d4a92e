"""The models that a base's rows need, in one value: which are loaded, what identifies them, their decoder."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.config.errors import UserError
from pipeline.config.points import REFERENCE, policy_lane
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.decoding.backbone import plan_backbones
from pipeline.decoding.decoder import Generation, GuidedDecoder, Request
from pipeline.models import memory
from pipeline.models.identity import folder_identity
from pipeline.models.loading import Source, resolve_device


class Decoder(Protocol):
    """What turns requests into generations: `GuidedDecoder`, and the searches it is compared with."""

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """The chunks it works off one after the other, as indices into the requests."""

    def generate(self, requests: Sequence[Request], progress: str | None = None) -> Iterator[tuple[int, Generation]]:
        """Yield (index, generation) as rows finish."""


class ModelSet:
    """The models of a base's rows, as the experiment names them: the base, ARMs, their reference, the base's policies.

    Args:
        params: the experiment.
        workspace: where the models are.
        base: the model that is steered.
        used: the lanes that any row asks for.
        adapters: further adapters of the base, by lane.
    """

    def __init__(
        self, params: Params, workspace: Workspace, base: str, used: Collection[str],
        adapters: Mapping[str, Path] | None = None,
    ) -> None:  # fmt: skip
        self._params, self._workspace, self._base, self._used = params, workspace, base, used
        self.strong = Source.of(params, workspace, base)
        self.arms = {name: workspace.arm(name) for name in params.objectives if name in used}
        known = {policy_lane(name): workspace.rival(base, name) for name in params.tune.rivals} | dict(adapters or {})
        self.policies = {lane: folder for lane, folder in known.items() if lane in used}
        another = params.arm.base != base and (self.arms or REFERENCE in used)
        self.weak = Source.of(params, workspace, params.arm.base) if another else None

    @property
    def sources(self) -> list[Source]:
        """The models that are loaded, each with the adapters that run on it."""
        needs_reference = REFERENCE in self._used
        _, beside = plan_backbones(self.strong, self.arms, self.weak, self.policies, needs_reference)
        return [self.strong, *(other.source for other in beside)]

    def identities(self, device: torch.device) -> dict[str, Any]:
        """Per lane, all that its log-probabilities depend on beside the base."""
        found: dict[str, Any] = {
            name: folder_identity(folder) for name, folder in {**self.arms, **self.policies}.items()
        }
        if self.weak is not None:
            weak = self.weak.identity(device)
            found |= {REFERENCE: weak} | {name: [found[name], *weak] for name in self.arms}
        return found

    def decoder(self, device: str, batch_size: int) -> GuidedDecoder:
        """A decoder of all of them.

        Raises:
            UserError: the models cannot fit into memory (nothing is loaded then), or do not fit each other.
        """
        counted = len(self.arms), len(self.policies), REFERENCE in self._used
        needs = memory.needs_of(self._params, self._workspace, memory.served(self._params, self._base, *counted))
        memory.refuse_too_large(needs, resolve_device(device), self.strong.device_map is not None)
        return GuidedDecoder.load(
            self.strong, self.arms, arm_base=self.weak, policies=self.policies, reference=REFERENCE in self._used,
            device=device, batch_size=batch_size,
        )  # fmt: skip

    def vllm_decoder(self, batch_size: int) -> Decoder:
        """All of them inside vLLM.

        Raises:
            UserError: vLLM is not installed here, or an ARM does not fit the base.
        """
        try:
            from pipeline.decoding.vllm.decoder import VllmDecoder
        except ImportError as error:
            raise UserError(
                "decoding.engine=vllm needs vLLM: `make vllm`, then `source .venv-vllm/bin/activate`."
            ) from error
        return VllmDecoder(
            self.strong, self.arms, arm_base=self.weak, policies=self.policies, reference=REFERENCE in self._used,
            batch_size=batch_size,
        )  # fmt: skip
