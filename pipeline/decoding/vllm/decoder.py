"""`GuidedDecoder`'s face on vLLM: continuous batching, paged KV cache, multi-LoRA, tensor parallelism, quantised bases.

Every request is a group of lanes (see `processor`). What can break a group is prevented as far as a frontend can:
never more lanes than slots, never more prompt tokens in a step than its budget, no chunked prefill. The rest, such as a
preemption for want of KV cache, shows as a mark: the other lanes are taken back, and the group goes on from its last
good token with fewer groups beside it.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.decoding.vllm.settings import ends_and_marks, environment, settings

os.environ |= environment()
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process where nothing asks for more

import vllm
from tqdm import tqdm
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from pipeline.config.errors import UserError
from pipeline.decoding.backbone import plan_backbones
from pipeline.decoding.request import Generation, Request, until_stop
from pipeline.decoding.vllm.adapters import Adapters
from pipeline.decoding.vllm.lanes import Shaping, lane_params
from pipeline.models.loading import Source

_ROUNDS = 4  # batches' worth of rows that are planned together, as in `GuidedDecoder`
_ATTEMPTS = 3  # at one position, a group alone in the engine, beside one for each prompt that is cached meanwhile


@dataclass
class _Group:
    """One request on its way through the engine."""

    index: int
    request: Request
    prompts: list[list[int]]  # per model, as it is asked
    alphas: dict[str, float]  # of its lanes inside the engine, the base's first
    guides: dict[str, float]  # of those beside it
    tokens: list[int] = field(default_factory=list)
    part: int = 0  # how often it has been begun
    stuck: int = 0  # how often in a row it came to nothing while alone
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    live: dict[str, int] = field(default_factory=dict)  # lanes in the engine: request id -> lane
    ended: dict[int, tuple[list[int], Any]] = field(default_factory=dict)  # lane -> tokens, stop reason
    stopped: list[int] | None = None  # the base lane's tokens, once a stop text is among them

    @property
    def ids(self) -> list[int]:
        """The prompt as the base reads it."""
        return self.prompts[0]

    @property
    def name(self) -> str:
        """The group as the processor knows it."""
        return f"{self.index}.{self.part}"


class VllmDecoder:
    """A frozen base steered by LoRA ARMs inside vLLM; needs the environment of `make vllm`.

        decoder = VllmDecoder(Source(Path("models/smollm2-135m")), {"positivity": Path("models/arms/positivity")})
        for index, generation in decoder.generate(requests):
            print(requests[index].prompt, generation.text)

    Args:
        base: the base.
        arms: folder of each ARM: an adapter of the base is a lane of the engine, any other a guide beside it.
        arm_base: what the ARMs were made from, where that is not the base.
        policies: adapters of the base itself beside ARMs of another model.
        reference: give `arm_base` a lane called `reference`, for the log-ratio form.
        batch_size: groups in the engine at once; a group has a lane more than it has adapters.
        engine: further arguments of `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        UserError: an ARM does not fit the base.
    """

    def __init__(
        self, base: Source, arms: Mapping[str, Path], *, arm_base: Source | None = None,
        policies: Mapping[str, Path] | None = None, reference: bool = False, batch_size: int = 32, **engine: Any,
    ) -> None:  # fmt: skip
        adapters, beside = plan_backbones(base, arms, arm_base, policies or {}, reference)
        self._prompters = [base.prompter(), *(side.source.prompter() for side in beside)]
        self._prompter = self._prompters[0]
        known = enumerate(adapters.items(), 1)
        loaded = {name: LoRARequest(name, number, str(folder)) for number, (name, folder) in known}
        self._adapters = Adapters(loaded, beside)
        self._guides = [name for side in beside for name in side.names]
        self._batch_size = batch_size
        self._llm = vllm.LLM(**settings(base, adapters, beside, batch_size) | {"disable_log_stats": True} | engine)
        self._engine = self._llm.llm_engine
        config = self._engine.vllm_config
        self._contexts = [config.model_config.max_model_len, *(side.source.context for side in beside)]
        self._budget = config.scheduler_config.max_num_batched_tokens
        self._ends, [self._mark, *_] = ends_and_marks(base)

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """The chunks that `generate` works off one after the other, as indices into `requests`."""
        size = self._batch_size * _ROUNDS
        order = sorted(range(len(requests)), key=lambda index: requests[index].prompt)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def generate(self, requests: Sequence[Request], progress: str | None = None) -> Iterator[tuple[int, Generation]]:
        """Yield (index into `requests`, generation) as rows finish, under a progress bar called `progress`.

        Raises:
            UserError: a request names an unknown ARM, or exceeds the context (nothing is generated then); the
                KV cache does not hold one group.
        """
        read = {
            prompt: [prompter.prompt_ids(prompt) for prompter in self._prompters]
            for prompt in dict.fromkeys(request.prompt for request in requests)
        }
        groups = [
            _Group(index, request, read[request.prompt], *self._adapters.lanes(request))
            for index, request in enumerate(requests)
        ]
        for group in groups:
            self._check(group)
        with tqdm(total=len(requests), desc=progress, unit="row", smoothing=0.05, disable=progress is None) as bar:
            for chunk in self.plan(requests):
                for group, generation in self._run([groups[index] for index in chunk]):
                    bar.update()
                    yield group.index, generation

    def _check(self, group: _Group) -> None:
        request = group.request
        known = [*self._adapters.adapters, *self._guides]
        for name in request.arms:
            if name not in known:
                raise UserError(f"weights name {name}, but the ARMs are {', '.join(known) or 'none'}.")
        for ids, context in zip(group.prompts, self._contexts, strict=True):
            if len(ids) + request.max_new_tokens > context:
                raise UserError(
                    f"the prompt {request.prompt[:60]!r}… has {len(ids)} tokens and with {request.max_new_tokens} "
                    f"new ones exceeds the context of {context}: shorten it or lower decoding.max_new_tokens."
                )

    def _run(self, groups: list[_Group]) -> Iterator[tuple[_Group, Generation]]:
        """Generate groups, as many at once as there is room for."""
        waiting, room = deque(groups), self._batch_size
        running: dict[int, _Group] = {}
        lanes: dict[str, _Group] = {}
        try:
            while waiting or running:
                budget = self._budget - sum(len(group.live) for group in running.values())
                while waiting and len(running) < room:
                    needed = (len(waiting[0].ids) + len(waiting[0].tokens)) * len(waiting[0].alphas)
                    if needed > budget and running:
                        break
                    budget -= needed
                    group = waiting.popleft()
                    running[group.index] = group
                    lanes |= dict.fromkeys(self._begin(group), group)
                for output in self._engine.step():
                    group = lanes[output.request_id]
                    if output.request_id in group.live:  # and was not taken back meanwhile
                        self._take(group, output)
                for group in [group for group in running.values() if group.ended or group.stopped]:
                    generation = self._end(group)
                    del running[group.index]
                    if generation is not None:
                        yield group, generation
                    else:
                        if not running:
                            group.stuck += 1
                            if group.stuck >= _ATTEMPTS + len(group.alphas):
                                raise UserError(
                                    "the KV cache does not hold one guided request, or one step its prompts: give vLLM "
                                    "more memory or a larger max_num_batched_tokens, or lower decoding.max_new_tokens."
                                )
                        room = max(1, min(room, len(running)))
                        waiting.appendleft(group)
        finally:
            self._engine.abort_request([name for group in running.values() for name in group.live])
            for lane in [lane for group in running.values() for lane in group.alphas]:
                self._adapters.give_back(lane)
            self._sums([group.name for group in running.values()])  # another `generate` uses the names again

    def _begin(self, group: _Group) -> list[str]:
        """Hand the lanes of a group to the engine, from where it stands."""
        group.part += 1
        group.live, group.ended, group.stopped = {}, {}, None
        request = group.request
        lanes = lane_params(
            group.name, request, group.alphas, Shaping(stop_token_ids=tuple(self._ends)), mark=self._mark,
            first=len(group.tokens), sums=True,
            guides=group.guides, prompts=[[*ids, *group.tokens] for ids in group.prompts[1:]],
            output=RequestOutputKind.CUMULATIVE if request.stop else RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        for lane, (model, params) in enumerate(zip(group.alphas, lanes, strict=True)):
            name = f"{group.name}.{lane}"
            prompt: Any = {"prompt_token_ids": [*group.ids, *group.tokens]}
            self._adapters.take(model)
            self._engine.add_request(name, prompt, params, lora_request=self._adapters.find(model))
            group.live[name] = lane
        return list(group.live)

    def _take(self, group: _Group, output: Any) -> None:
        """Note what a lane says: that it has ended, or what the base's lane has written so far."""
        tokens, stop = list(output.outputs[0].token_ids), group.request.stop
        if output.finished:
            group.ended[group.live.pop(output.request_id)] = tokens, output.outputs[0].stop_reason
        elif stop and any(text in self._prompter.spell(group.tokens + tokens) for text in stop):
            group.stopped = tokens

    def _end(self, group: _Group) -> Generation | None:
        """A generation once all lanes agree; None where the group has to go on from its last good token."""
        self._engine.abort_request(list(group.live))
        for lane in group.alphas:
            self._adapters.give_back(lane)
        parts, marked = [tokens for tokens, _ in group.ended.values()], False
        if group.stopped is not None and not parts:
            whole, is_stopped = True, group.stopped
        else:
            whole = not group.live and all(tokens == parts[0] for tokens in parts)
            marked = any(reason == self._mark for _, reason in group.ended.values())
            # Lanes that are whole drew the mark in earnest, as any token; of others the mark was no draw.
            is_stopped = parts[0] if whole else _common([part[: -1 if marked else None] for part in parts])
        sums = self._sums([group.name]).get(group.name, [0.0] * 3)
        group.sums = [total + added for total, added in zip(group.sums, sums, strict=True)]
        if not all(map(math.isfinite, group.sums)):
            raise UserError(
                f"logits are not finite in the response to {group.request.prompt[:60]!r}: set base.dtype=float32, or "
                "check the models' weights and α."
            )
        group.stuck = 0 if is_stopped else group.stuck
        group.tokens += is_stopped
        if not whole or (marked and len(group.tokens) < group.request.max_new_tokens):
            return None
        text, stops = self._prompter.spell(group.tokens), group.request.stop
        finish = "eos" if group.tokens[-1] in self._ends else "length"
        if finish == "length" and any(stop in text for stop in stops):
            finish = "stop"
        logp, logp_base, kl = group.sums
        models = len(group.alphas) + len(group.guides)
        forwards = None if models == 1 + len(group.request.arms) else models * len(group.tokens)
        text = until_stop(text, stops).strip()
        return Generation(text, len(group.ids), group.tokens, finish, logp, logp_base, kl, forwards)

    def _sums(self, names: list[str]) -> dict[str, list[float]]:
        """What the processor has added up for groups, which it forgets."""
        sums: dict[str, list[float]] = self._llm.collective_rpc("take_sums", args=(names,))[0]
        return sums


def _common(parts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all begin with."""
    shortest = min(parts, key=len)
    for place, token in enumerate(shortest):
        if any(part[place] != token for part in parts):
            return list(shortest[:place])
    return list(shortest)
