"""Guided responses in the shapes of the OpenAI API, by vLLM's own classes: whole, or as server-sent events."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion import protocol as chat
from vllm.entrypoints.openai.completion import protocol as completion
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from pipeline.decoding.vllm.logprobs import TokenLogprobs
from pipeline.decoding.vllm.requests import GuidedChat, GuidedCompletion
from pipeline.decoding.vllm.response import Delta

_LOWEST = -9999.0  # vLLM's: JSON has no infinity


class Answer:
    """To one request, however many responses it is for.

    Args:
        request: what it answers.
        model: the base's name.
        prompt_tokens: how long the base's prompt is.
        tokenizer: spells tokens.
    """

    def __init__(
        self, request: GuidedChat | GuidedCompletion, model: str, prompt_tokens: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._request, self._chat = request, isinstance(request, GuidedChat)
        self._prompt_tokens, self._tokenizer = prompt_tokens, tokenizer
        self._head = {"id": f"guided-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._tokens = 0

    async def whole(self, responses: Sequence[AsyncGenerator[Delta]]) -> Any:
        """All responses at once, a `ChatCompletionResponse` or a `CompletionResponse`."""
        choices: list[list[Delta]] = [[] for _ in responses]
        async for index, delta in merged(responses):
            choices[index].append(delta)
            self._tokens += len(delta.tokens)
        answer: Any = chat.ChatCompletionResponse if self._chat else completion.CompletionResponse
        return answer(
            **self._head, choices=[self._choice(index, deltas) for index, deltas in enumerate(choices)],
            usage=self._usage(),
        )  # fmt: skip

    def _choice(self, index: int, deltas: Sequence[Delta]) -> Any:
        text = "".join(delta.text for delta in deltas)
        logprobs = self._logprobs([record for delta in deltas for record in delta.logprobs], 0)
        end = {"finish_reason": deltas[-1].finish, "stop_reason": deltas[-1].stop_reason, "logprobs": logprobs}
        if self._chat:
            message = chat.ChatMessage(role="assistant", content=text)
            return chat.ChatCompletionResponseChoice(index=index, message=message, **end)
        return completion.CompletionResponseChoice(index=index, text=text, **end)

    async def events(self, responses: Sequence[AsyncGenerator[Delta]]) -> AsyncIterator[str]:
        """Server-sent events; an error is the last of them."""
        options = self._request.stream_options
        lengths = [0] * len(responses)
        try:
            if self._chat:
                for index in range(len(responses)):
                    yield self._event(index, Delta("", [], []), 0, role="assistant")
            async for index, delta in merged(responses):
                self._tokens += len(delta.tokens)
                yield self._event(index, delta, lengths[index])
                lengths[index] += len(delta.text)
            if options and options.include_usage:
                yield _event(self._chunk([], usage=self._usage()))
        except Exception as error:  # the status is sent already
            yield _event(create_error_response(error))
        yield "data: [DONE]\n\n"

    def _event(self, index: int, delta: Delta, offset: int, role: str | None = None) -> str:
        end = {"finish_reason": delta.finish, "stop_reason": delta.stop_reason}
        end |= {"logprobs": self._logprobs(delta.logprobs, offset)}
        if self._chat:
            message = DeltaMessage(content=delta.text, **({"role": role} if role else {}))
            choice: Any = chat.ChatCompletionResponseStreamChoice(index=index, delta=message, **end)
        else:
            choice = completion.CompletionResponseStreamChoice(index=index, text=delta.text, **end)
        options = self._request.stream_options
        usage = self._usage() if options and options.continuous_usage_stats else None
        return _event(self._chunk([choice], **({"usage": usage} if usage else {})))

    def _chunk(self, choices: list[Any], **more: Any) -> Any:
        chunk: Any = chat.ChatCompletionStreamResponse if self._chat else completion.CompletionStreamResponse
        return chunk(**self._head, choices=choices, **more)

    def _usage(self) -> UsageInfo:
        total = self._prompt_tokens + self._tokens
        return UsageInfo(prompt_tokens=self._prompt_tokens, completion_tokens=self._tokens, total_tokens=total)

    def _logprobs(self, records: Sequence[TokenLogprobs], offset: int) -> Any:
        """In OpenAI's shape, with `models` beside it: what the base and each ARM say of each token."""
        if not records:
            return None
        if self._chat:
            return chat.ChatCompletionLogProbs(
                content=[
                    chat.ChatCompletionLogProbsContent(
                        **self._spelled(record["token"], record["logprob"]), models=_bounded(record["models"]),
                        top_logprobs=[chat.ChatCompletionLogProb(**self._spelled(*likely)) for likely in record["top"]],
                    )
                    for record in records
                ]
            )  # fmt: skip
        texts = [self._spell(record["token"]) for record in records]
        # Tokens that are parts of a character are all spelled "\ufffd": of those, the likeliest is listed.
        tops = [{self._spell(token): logp for token, logp in reversed(record["top"])} for record in records]
        return completion.CompletionLogProbs(
            tokens=texts, token_logprobs=[max(record["logprob"], _LOWEST) for record in records],
            text_offset=[offset + sum(map(len, texts[:place])) for place in range(len(texts))],
            top_logprobs=[_bounded(dict(reversed(top.items()))) for top in tops],
            models=[_bounded(record["models"]) for record in records],
        )  # fmt: skip

    def _spell(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._spell(token)
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(text.encode(errors="replace"))}


async def merged(responses: Sequence[AsyncGenerator[Delta]]) -> AsyncGenerator[tuple[int, Delta]]:
    """What several responses grow by, with their index, as it comes.

    Raises:
        Exception: the first of any of them; the others are given up.
    """
    grown: asyncio.Queue[Any] = asyncio.Queue()

    async def read(index: int, response: AsyncGenerator[Delta]) -> None:
        try:
            async for delta in response:
                grown.put_nowait((index, delta))
            grown.put_nowait(None)
        except Exception as error:
            grown.put_nowait(error)
        finally:
            await response.aclose()

    tasks = [asyncio.create_task(read(index, response)) for index, response in enumerate(responses)]
    try:
        running = len(tasks)
        while running:
            item = await grown.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _bounded(logps: dict[str, float]) -> dict[str, float]:
    return {name: max(logp, _LOWEST) for name, logp in logps.items()}


def _event(model: Any) -> str:
    return f"data: {model.model_dump_json(exclude_unset=True)}\n\n"
