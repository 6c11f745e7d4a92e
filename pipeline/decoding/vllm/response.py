"""One guided response out of vLLM's asynchronous engine: its lanes as requests, its text as it grows."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter
from transformers import PreTrainedTokenizerBase
from vllm.exceptions import GenerationError
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from pipeline.config.errors import UserError
from pipeline.config.points import BASE
from pipeline.decoding.request import Request
from pipeline.decoding.vllm.adapters import Adapters
from pipeline.decoding.vllm.lanes import Shaping, lane_params
from pipeline.decoding.vllm.logprobs import TokenLogprobs
from pipeline.decoding.vllm.text import GrowingText

_PARTS = 50  # that a response is begun in at most

REQUESTS = Counter("genarm:guided_requests", "Guided responses by how they ended.", ["finish"])
TOKENS = Counter("genarm:guided_tokens", "Tokens of guided responses.")
LANES = Counter("genarm:guided_lanes", "Lanes that were handed to the engine.")
LOST = Counter("genarm:guided_groups_lost", "Groups that lost a lane and were begun again from their last token.")


@dataclass
class Delta:
    """What a response has grown by."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish: str | None = None  # stop | length
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class Job:
    """A guided response to be written."""

    request: Request
    shaping: Shaping
    prompt: Sequence[int]
    prompts: Sequence[Sequence[int]]  # of the guides
    ends: frozenset[int]  # tokens that end it because the model says so; a client's own are in `shaping`
    mark: tuple[int, int]  # two tokens that do not end it, for lanes of groups that are not whole


@dataclass
class _Progress:
    """How far a response is, over all parts that it was begun in."""

    text: GrowingText
    tokens: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # fetched, by position


class Responder:
    """Writes guided responses with an engine.

    Args:
        engine: vLLM's client of it.
        adapters: those of lanes.
        tokenizer: the base's.
        groups: responses at once.
    """

    def __init__(self, engine: Any, adapters: Adapters, tokenizer: PreTrainedTokenizerBase, groups: int) -> None:
        self._engine, self._adapters, self._tokenizer = engine, adapters, tokenizer
        self._groups, self._room = groups, asyncio.Semaphore(groups)

    async def exchange(self, adapters: Mapping[str, LoRARequest]) -> None:
        """Guide by other adapters of these names, once responses under way have ended; new ones wait for that.

        Raises:
            UserError: what was one ARM for all mixes would be one no more, or another would.
        """
        if not self._adapters.fit(adapters):
            raise UserError("ARMs of one training for all mixes are exchanged together: wait until all are written.")
        async with contextlib.AsyncExitStack() as everyone:
            for _ in range(self._groups):
                await everyone.enter_async_context(self._room)
            # The former one first, so that there is a slot; where loading fails, vLLM fetches it again when asked.
            for name, adapter in adapters.items():
                await self._engine.remove_lora(self._adapters.adapters[name].lora_int_id)
                await self._engine.add_lora(adapter)
            self._adapters.exchange(adapters)

    async def write(self, job: Job) -> AsyncGenerator[Delta]:
        """Yield a response as it grows; it is begun again behind its last good token where a lane was lost.

        Raises:
            GenerationError: it was begun too often.
            Exception: what vLLM says to a lane.
        """
        finish = "abort"
        try:
            async with self._room:
                progress = _Progress(GrowingText(self._tokenizer, job.request.stop))
                for part in range(_PARTS):
                    async with contextlib.aclosing(self._part(job, progress, part)) as deltas:
                        async for delta in deltas:
                            TOKENS.inc(len(delta.tokens))
                            finish = delta.finish or finish
                            yield delta
                    if finish != "abort":
                        return
                    LOST.inc()
            finish = "error"
            raise GenerationError(
                f"a guided request was begun {_PARTS} times and lost a lane each time: its lanes do not fit into "
                "vLLM's cache or into one step (--max-num-batched-tokens), a model's logits are not finite (set dtype "
                "to float32), or its format allows no further token."
            )
        finally:
            REQUESTS.labels(finish).inc()

    async def _part(self, job: Job, progress: _Progress, part: int) -> AsyncGenerator[Delta]:
        """What a group draws until it ends or loses a lane."""
        mark, group = job.mark[part % 2], uuid.uuid4().hex  # if the law itself drew one mark, the other tells it apart
        request, first = job.request, len(progress.tokens)
        alphas, guides = self._adapters.lanes(request)
        lanes = lane_params(
            group, request, alphas, job.shaping, mark=mark, first=first, guides=guides,
            prompts=[[*ids, *progress.tokens] for ids in job.prompts], output=RequestOutputKind.DELTA,
        )  # fmt: skip
        prompt = tokens_input([*job.prompt, *progress.tokens])
        outputs: asyncio.Queue[Any] = asyncio.Queue()

        async def run(model: str, params: Any) -> None:
            name = f"{group}-{model}"
            self._adapters.take(model)
            try:
                adapter = await asyncio.to_thread(self._adapters.find, model)
                async for output in self._engine.generate(prompt, params, name, lora_request=adapter):
                    if model == BASE:
                        outputs.put_nowait(output.outputs[0])
            except Exception as error:  # the other lanes would wait for this one for ever
                outputs.put_nowait(error)
            finally:
                self._adapters.give_back(model)

        LANES.inc(len(lanes))
        tasks = [asyncio.create_task(run(model, params)) for model, params in zip(alphas, lanes, strict=True)]
        try:
            finished = False
            while not finished:
                output = await outputs.get()
                if isinstance(output, Exception):
                    raise output
                finished = output.finish_reason is not None
                lost = finished and output.stop_reason == mark
                tokens = list(output.token_ids)
                tokens = tokens[:-1] if lost and tokens[-1:] == [mark] else tokens
                delta = await self._delta(job, progress, group, tokens, None if lost else output.finish_reason)
                if delta.tokens or delta.text or delta.finish:
                    yield delta
                finished = finished or progress.text.stopped
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if job.shaping.top_logprobs is not None:
                await asyncio.shield(self._fetch(group, progress))

    async def _delta(self, job: Job, progress: _Progress, group: str, tokens: list[int], finish: str | None) -> Delta:
        """What these tokens add to a response."""
        progress.tokens += tokens
        ended_by = tokens[-1] if finish == "stop" else None  # an end is not spelled
        text = progress.text.grow(tokens if ended_by is None else tokens[:-1], finish is not None)
        delta = Delta(text, tokens, [], finish, None if ended_by in job.ends else ended_by)
        if progress.text.stopped:
            delta.finish, delta.stop_reason = "stop", progress.text.stopped_by
        if job.shaping.top_logprobs is not None and tokens:
            places = range(len(progress.tokens) - len(tokens), len(progress.tokens))
            if not all(place in progress.logprobs for place in places):
                await self._fetch(group, progress)
            delta.logprobs = [progress.logprobs.pop(place) for place in places]
        return delta

    async def _fetch(self, group: str, progress: _Progress) -> None:
        """Fetch log-probabilities from the first worker; all have the same."""
        records = (await self._engine.collective_rpc("take_logprobs", args=(group,)))[0]
        progress.logprobs |= {int(place): record for place, record in records.items()}
