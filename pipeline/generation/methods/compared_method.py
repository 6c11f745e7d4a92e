"""A method of the comparison, ready for requests at mixes of objectives: what it samples from, or how it searches."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.config.errors import UserError
from pipeline.config.methods import (
    BestOf,
    Bytes,
    Candidates,
    GenArm,
    Method,
    Policies,
    Prefixes,
    Prompting,
    Segments,
    Words,
)
from pipeline.config.points import REFERENCE, Mix
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import digest
from pipeline.data.responses import GeneratedRow
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.guidance import LAW_VERSION
from pipeline.generation.methods import Law, Place, conditioned_arm, genarm, mod, morl, prompting, soups
from pipeline.generation.methods.args import Args
from pipeline.generation.methods.best_of_n import BestOfN
from pipeline.generation.methods.byte_proxy_tuning import ByteProxyTuning
from pipeline.generation.methods.cards import Cards
from pipeline.generation.methods.controlled_decoding import ControlledDecoding
from pipeline.generation.methods.lookahead_cache import TextReward
from pipeline.generation.methods.nudging import Nudging
from pipeline.generation.methods.transfer_q import TransferQ
from pipeline.generation.model_set import Decoder, ModelSet
from pipeline.generation.rows import generate_stored, prompt_tokens, request_key, stored
from pipeline.models import memory
from pipeline.models.identity import folder_identity
from pipeline.models.loading import Source, resolve_device
from pipeline.models.prefix_scorer import PrefixValues

_VERSION = 2  # of the searches: raise it when the same request would give another row


class ComparedMethod:
    """One method.

    Args:
        method: what it is.
        params: the experiment.
        workspace: where models and stores are.
        base: the model that is steered.
        mixes: all that its requests will have; adapters that are made of others are written now.

    Raises:
        UserError: something it needs is not trained.
    """

    def __init__(self, method: Method, params: Params, workspace: Workspace, base: str, mixes: Sequence[Mix]) -> None:
        self._method, self._params, self._workspace, self._base = method, params, workspace, base
        self._source = Source.of(params.models, workspace, base)
        place = Place(params, workspace, base)
        self._laws: dict[tuple[str, float], Law] = {}
        self._rewards: dict[str, Path] = {}
        self._sentences: dict[str, str | None] = {}
        self._models: ModelSet | None = None  # where ARMs guide otherwise than by a law of tokens
        if isinstance(method, GenArm | Policies):
            self._laws = {(mix.point, mix.strength): _law(method, mix, place) for mix in mixes}
        elif isinstance(method, Prompting):
            self._sentences = prompting.sentences_of(method, params.objectives)
        elif isinstance(method, Bytes | Words):
            named = {name for mix in mixes for name in mix.weights}
            self._models = ModelSet(params, workspace, base, {*named, REFERENCE})
        else:
            kind = "prefix_scorer" if isinstance(method, Prefixes) else "reward_model"
            self._rewards = {name: _reward_of(name, kind, place) for name in params.objectives}
        self._adapters = {lane: folder for law in self._laws.values() for lane, folder in law.adapters.items()}

    @property
    def trained(self) -> set[Path]:
        """The folders of what had to be trained for all of its mixes."""
        arms = set(self._models.arms.values()) if self._models else set()
        return {folder for law in self._laws.values() for folder in law.trained} | set(self._rewards.values()) | arms

    def request(self, mix: Mix, prompt: str, sample: int) -> Request:
        """A prompt at a mix."""
        decoding, law = self._params.decoding, self._laws.get((mix.point, mix.strength))
        weights = law.weights if law else {name: weight * mix.strength for name, weight in mix.weights.items()}
        if isinstance(self._method, Prompting):
            weights = prompting.weights(self._method, weights)
        return Request(
            prompt, weights, decoding.temperature, decoding.top_k, decoding.top_p, decoding.min_p,
            decoding.max_new_tokens, decoding.stop, self._params.seed, sample,
        )  # fmt: skip

    def rows(self, requested: Sequence[tuple[Mix, Request]]) -> list[GeneratedRow]:
        """The rows of requests, from the store or generated, each with the positions that models computed for it.

        The base computes every token, whether it is part of the law or is only needed for the KL to it.
        """
        requests = [request for _, request in requested]
        if not self._laws:
            rows = stored(requests, self._keys(requests), self.decoder, self._workspace, "search")
            return _with_forwards(requests, rows) if self._sentences else rows
        params = self._params
        rows = generate_stored(requests, params, self._workspace, self._base, "generate", self._adapters)
        return _with_forwards(requests, rows)

    def _keys(self, requests: Sequence[Request]) -> list[str]:
        config = {name: value for name, value in asdict(self._method).items() if name not in ("strengths", "prompts")}
        device = resolve_device(self._params.decoding.device)
        origin = [_VERSION, LAW_VERSION, *self._source.identity(device), config]
        others = {name: folder_identity(folder) for name, folder in self._rewards.items()} | self._sentences
        others |= self._models.identities(device) if self._models else {}
        weak = self._models.weak if self._models else None
        tokens = prompt_tokens(requests, self._source, *([weak] if weak else []))
        return [
            digest([*origin, [others[name] for name in request.arms], request_key(request), tokens[request.prompt]])
            for request in requests
        ]

    def decoder(self, batch_size: int | None = None) -> Decoder:
        """The decoder of its requests, loaded.

        Raises:
            UserError: its models cannot fit into memory (nothing is loaded then).
        """
        params, workspace, place = self._params, self._workspace, self._params.decoding.device
        size = batch_size or params.decoding.batch_size
        if self._laws:
            used = {lane for law in self._laws.values() for lane, weight in law.weights.items() if weight}
            return ModelSet(params, workspace, self._base, used, self._adapters).decoder(place, size, stored=True)
        if isinstance(self._method, Prompting):
            return prompting.decoder(self._method, self._source, params.objectives, place, size)
        device = resolve_device(place)
        if self._models:
            own, *beside = self._models.backbones(place, size)
            if isinstance(self._method, Words):
                return Nudging(own, beside, size, self._method.threshold)
            return ByteProxyTuning(own, beside, size)
        others = 0 if isinstance(self._method, Prefixes) else len(self._rewards)  # a reward model is the base, adapted
        models = [memory.Loaded.at(self._source, 1)] * (1 + others)
        needs = memory.needs_of(models, size, params.decoding.max_new_tokens, device)
        memory.refuse_too_large(needs, device, False)
        prompter, method = self._source.prompter(), self._method
        if isinstance(method, Prefixes):
            base = self._source.load(device)
            values = {name: PrefixValues.load(folder, base) for name, folder in self._rewards.items()}
            return ControlledDecoding(base, prompter, values, size, method.scale, method.value == "log_probability")
        rewards = {name: TextReward.load(self._source, folder, device) for name, folder in self._rewards.items()}
        if isinstance(method, BestOf):
            decoder = GuidedDecoder.load(self._source, {}, device=place, batch_size=size)
            return BestOfN(decoder, prompter, rewards, method.n)
        common = self._source.load(device), prompter, rewards, size
        if isinstance(method, Segments):
            return Cards(*common, method.threshold, method.longest, method.tries, method.target, method.softness)
        assert isinstance(method, Candidates)
        if method.kind == "args":
            return Args(*common, method.top_k, method.scale)
        return TransferQ(*common, method.top_k, method.scale, method.horizon)


def _with_forwards(requests: Sequence[Request], rows: Sequence[GeneratedRow]) -> list[GeneratedRow]:
    return [
        replace(row, forwards=row.forwards or (1 + len(request.arms)) * row.n_tokens)
        for request, row in zip(requests, rows, strict=True)
    ]


def _law(method: GenArm | Policies, mix: Mix, place: Place) -> Law:
    if isinstance(method, GenArm):
        return genarm.law(method, mix, place)
    if method.kind == "mod":
        return mod.law(mix, place)
    if method.kind in ("morl", "rloo"):
        return morl.law("dpo" if method.kind == "morl" else "rloo", mix, place)
    if method.kind in ("parm", "uniarm"):
        return conditioned_arm.law(method.kind, mix, place)
    return soups.law(method.kind == "soup", mix, place)


def _reward_of(objective: str, kind: str, place: Place) -> Path:
    for name, rival in place.params.tune.rivals.items():
        if rival.kind == kind and rival.weights.keys() == {objective}:
            return place.rival(name)
    what = kind.replace("_", " ")
    raise UserError(f"{objective} has no {what} to search with: add one to tune.rivals, with kind: {kind}.")
