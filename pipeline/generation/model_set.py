"""The models that a base's rows need, in one value: which are loaded, what identifies them, their decoder."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.config.errors import UserError
from pipeline.config.points import REFERENCE, rival_of
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.decoding.backbone import Backbone, load_backbones, plan_backbones
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
        self._params, self._used = params, used
        self.strong = Source.of(params.models, workspace, base)
        # By the names that are used: an experiment's other objectives and policies make no difference to these rows.
        self.arms = {name: workspace.arm(name) for name in sorted(used) if name in params.objectives}
        tuned = {lane: name for lane in sorted(used) if (name := rival_of(lane)) in params.tune.rivals and name}
        policies = {lane: workspace.rival(base, name) for lane, name in tuned.items()} | dict(adapters or {})
        self.policies = {lane: folder for lane, folder in policies.items() if lane in used}
        another = (self.arms or REFERENCE in used) and params.arm.base != base
        self.weak = Source.of(params.models, workspace, params.arm.base) if another else None

    @property
    def loaded(self) -> list[tuple[Source, int]]:
        """The models that are loaded, each with its lanes: its own, where it has a say, and one for each adapter."""
        adapters, beside = plan_backbones(self.strong, self.arms, self.weak, self.policies, REFERENCE in self._used)
        return [(self.strong, 1 + len(adapters)), *((side.source, len(side.names)) for side in beside)]

    def identities(self, device: torch.device) -> dict[str, Any]:
        """Per lane, all that its log-probabilities depend on beside the base."""
        by_lane: dict[str, Any] = {
            name: folder_identity(folder) for name, folder in {**self.arms, **self.policies}.items()
        }
        if self.weak is not None:
            weak = self.weak.identity(device)
            by_lane |= {REFERENCE: weak} | {name: [by_lane[name], *weak] for name in self.arms}
        return by_lane

    def decoder(
        self, device: str, batch_size: int, new_tokens: int | None = None, stored: bool = False
    ) -> GuidedDecoder:
        """A decoder of all of them.

        Args:
            device: where it computes.
            batch_size: rows at once.
            new_tokens: how long responses will be, for the check of the memory; None: as `params.decoding` says.
            stored: whether rows are to come out the same again.

        Raises:
            UserError: the models cannot fit into memory (nothing is loaded then), or do not fit each other.
        """
        self._refuse_too_large(resolve_device(device), batch_size, new_tokens)
        # Only a model beside the base can draft.
        drafted = self._params.decoding.num_speculative_tokens if len(self.loaded) > 1 else 0
        if drafted is None and stored:
            drafted = 0  # what pays depends on times, and on that what numbers round to
        return GuidedDecoder.load(
            self.strong, self.arms, arm_base=self.weak, policies=self.policies, reference=REFERENCE in self._used,
            device=device, batch_size=batch_size, num_speculative_tokens=drafted,
        )  # fmt: skip

    def backbones(self, device: str, batch_size: int) -> list[Backbone]:
        """All of them with their weights, the base's first.

        Raises:
            UserError: as for `decoder`.
        """
        place = resolve_device(device)
        self._refuse_too_large(place, batch_size)
        return load_backbones(self.strong, self.arms, self.weak, self.policies, REFERENCE in self._used, place)

    def _refuse_too_large(self, place: torch.device, batch_size: int, new_tokens: int | None = None) -> None:
        models = [memory.Loaded.at(source, lanes) for source, lanes in self.loaded]
        needs = memory.needs_of(models, batch_size, new_tokens or self._params.decoding.max_new_tokens, place)
        memory.refuse_too_large(needs, place, self.strong.device_map is not None)

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


def planned_models(
    params: Params, workspace: Workspace, base: str, arms: int, policies: int, reference: bool
) -> list[memory.Loaded]:
    """The models that decoding on a base will hold once the ARMs are trained as `params.arm` says.

    Args:
        params: the experiment.
        workspace: where fetched models are.
        base: the model that is steered.
        arms: how many ARMs guide it.
        policies: how many adapters of the base itself are sampled from.
        reference: whether what the ARMs were made from has a say.
    """
    start, another = params.arm.base, params.arm.base != base
    if params.arm.tuning == "full":
        models = [(base, 1 + policies)] + [(start, 1)] * (arms + (reference and another))
    elif another and (arms or reference):
        models = [(base, 1 + policies), (start, arms + reference)]
    else:
        models = [(base, 1 + policies + arms)]
    sources = {name: Source.of(params.models, workspace, name) for name, _ in models}
    configs = {name: memory.config_of(name, params.models[name], sources[name].folder) for name, _ in models}
    return [memory.Loaded(name, sources[name], configs[name], lanes) for name, lanes in models]
