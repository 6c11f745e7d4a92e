"""What turns a guided request to vLLM's server into its lanes, and their tokens into one answer.

An ASGI middleware inside the server's own process (`--middleware`). Each lane is an ordinary completion of the same
application; the base's is what the answer is made of. What has no `guidance` passes untouched.
"""

import asyncio
import contextlib
import json
import os
import secrets
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config.errors import UserError
from pipeline.config.points import BASE
from pipeline.data.chat import UnfitError, spelled
from pipeline.decoding.request import Request, until_stop
from pipeline.decoding.vllm.guides import read
from pipeline.decoding.vllm.settings import EXTRA, TOLD
from pipeline.models.prompting import Prompter

_PATHS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat.completion"}
_TAKEN = {
    "model", "messages", "prompt", "guidance", "temperature", "top_k", "top_p", "min_p", "max_tokens",
    "max_completion_tokens", "seed", "stop", "stream", "stream_options", "user",
}  # fmt: skip
# What a client may say where it means nothing.
_NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1,
    "response_format": {"type": "text"}, "tool_choice": "none",
}  # fmt: skip
_PARTS = 50  # that a response is begun in at most


class RefusedError(Exception):
    """A request that cannot be guided: what the client is told, and the status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class _Text:
    """The text of a response's tokens as they come: what of it is certain, and nothing behind a stop text."""

    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[str]
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False
    _text: str = ""
    _told: int = 0  # characters of it
    _from: int = 0  # tokens before are not looked at again
    _spelled: int = 0  # tokens whose text is known

    def grown(self, tokens: Sequence[int], ended: bool) -> str:
        """What can be told now; a character whose last token is still to come is held back, unless there is none."""
        self.tokens += tokens
        before, whole = self._spell(self._spelled), self._spell(len(self.tokens))
        if ended or not whole.endswith("\ufffd"):
            self._text += whole[len(before) :]
            self._from, self._spelled = self._spelled, len(self.tokens)
        sure = until_stop(self._text, self.stops)
        self.stopped = len(sure) < len(self._text)
        held = 0 if ended or self.stopped else max(map(len, self.stops), default=1) - 1
        told, self._told = self._told, max(self._told, len(sure) - held)
        return sure[told : self._told]

    def _spell(self, end: int) -> str:
        return str(self.tokenizer.decode(self.tokens[self._from : end], skip_special_tokens=True))


@dataclass(frozen=True)
class _Delta:
    """What a response has grown by."""

    text: str
    finish: str | None = None


class Guided:
    """Given to vLLM's server by `--middleware`; what it has to know is in the environment."""

    def __init__(self, app: Any) -> None:
        self._app = app
        told = json.loads(os.environ[TOLD])
        self._base, self._adapters, self._room = told["base"], told["adapters"], asyncio.Semaphore(told["groups"])
        self._tokenizer = AutoTokenizer.from_pretrained(Path(told["folder"]), local_files_only=True)
        beside = [read(said) for said in told["guides"]]
        self._guides = [name for one in beside for name in one.names]
        self._prompters = [one.source.prompter() for one in beside]
        self._contexts = [one.source.context for one in beside]
        # None: the base is asked by its own chat template, which vLLM knows better.
        self._prompter = None if told["template"] is None else Prompter(self._tokenizer, told["template"])
        self._marks = told["marks"]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Answer guided requests; pass all others on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        try:
            wanted = json.loads(body)
            guided = isinstance(wanted, dict) and wanted.get("guidance") is not None
        except ValueError:
            guided = False
        if not guided:
            await self._app(scope, _replayed(body, receive), send)
            return
        if scope["path"] not in _PATHS:  # vLLM would answer as if nothing had been said of guidance
            await _refuse(send, f"guidance is for {' and '.join(_PATHS)}, not for {scope['path']}.")
            return
        answering = asyncio.ensure_future(self._answer(scope, wanted, send))
        leaving = asyncio.ensure_future(_left(receive))
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not answering.done():
            answering.cancel()  # takes the lanes back
        with contextlib.suppress(asyncio.CancelledError):
            await answering

    async def _answer(self, scope: Any, wanted: dict[str, Any], send: Any) -> None:
        wanted = {name: value for name, value in wanted.items() if value is not None}
        begun = False
        try:
            self._check(wanted)
            ids, room = await self._prompt(scope, wanted)
            prompts = [ids, *(self._asked_of(prompter, wanted, ids) for prompter in self._prompters)]
            left = [context - len(read) for context, read in zip(self._contexts, prompts[1:], strict=True)]
            request = self._request(wanted, min([room, *left]))
            if left and request.max_new_tokens > min(left):
                raise RefusedError(f"max_tokens is {request.max_new_tokens}, and a guide has room for {min(left)}.")
            said = _Answer(_PATHS[scope["path"]], self._base, len(ids))
            text = _Text(self._tokenizer, request.stop)
            async with self._room, contextlib.aclosing(self._grown(scope, prompts, request, text)) as grown:
                if not wanted.get("stream"):
                    deltas = [delta async for delta in grown]
                    await _respond(send, 200, json.dumps(said.whole(deltas, len(text.tokens))).encode())
                    return
                async for delta in grown:
                    if not begun:
                        await send(_start(200, b"text/event-stream"))
                        begun = True
                    await send(_event(said.event(delta)))
                if (wanted.get("stream_options") or {}).get("include_usage"):
                    await send(_event(said.used(len(text.tokens))))
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        except (RefusedError, RuntimeError) as error:
            status = error.status if isinstance(error, RefusedError) else 500
            if begun:
                await send(_event(_told(str(error), status)))
                await send({"type": "http.response.body", "body": b""})
            else:
                await _refuse(send, str(error), status)

    def _check(self, wanted: Mapping[str, Any]) -> None:
        """Refuse what would be left out of an answer without a word.

        Raises:
            RefusedError: an unknown ARM, or something that lanes cannot do.
        """
        for name, value in wanted.items():
            if name not in _TAKEN and value is not False and value not in ([], {}, _NEUTRAL.get(name)):
                raise RefusedError(f"a guided request cannot have {name}.")
        if wanted.get("model", self._base) != self._base:
            raise RefusedError(f"a guided request is to the base, {self._base}: its weights name the ARMs.")
        if not isinstance(wanted.get("stream_options", {}), dict):
            raise RefusedError('stream_options has the form {"include_usage": true}.')
        said = wanted["guidance"]
        weights = said.get("weights") if isinstance(said, dict) and len(said) == 1 else None
        if not isinstance(weights, dict) or not all(_is_number(alpha) for alpha in weights.values()):
            raise RefusedError('guidance has the form {"weights": {"objective": 1.0}}.')
        for name in weights:
            if name not in (*self._adapters, *self._guides, BASE):
                known = ", ".join([*self._adapters, *self._guides])
                raise RefusedError(f"weights name {name}, but the ARMs are {known}.")

    def _request(self, wanted: Mapping[str, Any], room: int) -> Request:
        """The request as `GuidedDecoder` knows it, so that the same seed writes the same text.

        Raises:
            RefusedError: a number out of its range.
        """
        messages, stop = wanted.get("messages"), wanted.get("stop", [])
        prompt = json.dumps(wanted.get("prompt")) if messages is None else _spelled(messages) or json.dumps(messages)
        seed = wanted["seed"] if "seed" in wanted else secrets.randbits(62)
        most = wanted.get("max_completion_tokens", wanted.get("max_tokens", 16 if messages is None else room))
        try:
            return Request(
                prompt, wanted["guidance"]["weights"], temperature=float(wanted.get("temperature", 1.0)),
                top_k=max(0, int(wanted.get("top_k", 0))), top_p=float(wanted.get("top_p", 1.0)),
                min_p=float(wanted.get("min_p", 0.0)), max_new_tokens=int(most), seed=int(seed),
                stop=(stop,) if isinstance(stop, str) else tuple(map(str, stop)),
            )  # fmt: skip
        except (TypeError, ValueError, OverflowError, UserError) as error:
            raise RefusedError(str(error)) from error

    async def _prompt(self, scope: Any, wanted: Mapping[str, Any]) -> tuple[list[int], int]:
        """The prompt as tokens, by the server's own template; and how many more the context has room for."""
        asked = {name: wanted[name] for name in ("prompt", "messages") if name in wanted}
        if isinstance(asked.get("prompt"), list) and all(isinstance(token, int) for token in asked["prompt"]):
            if not all(0 <= token < len(self._tokenizer) for token in asked["prompt"]):
                raise RefusedError(f"a prompt's tokens are below {len(self._tokenizer)}.")
            return list(asked["prompt"]), 0
        own = None
        if self._prompter is not None and "messages" in asked:  # as everywhere else here, dialogues and BOS included
            own, asked = self._asked_of(self._prompter, wanted, []), {"prompt": " "}
        chunks = [chunk async for chunk in self._asked(scope, "/tokenize", {"model": self._base, **asked})]
        found = json.loads(b"".join(chunks))
        ids = list(found["tokens"]) if own is None else own
        return ids, int(found["max_model_len"]) - len(ids)

    def _asked_of(self, prompter: Prompter, wanted: Mapping[str, Any], ids: list[int]) -> list[int]:
        """The prompt as a model of ours reads it: turns by its own template, all else as it stands."""
        if "messages" not in wanted:
            return ids
        prompt = _spelled(wanted["messages"])
        if prompt is None:
            raise RefusedError("messages are turns of system, user and assistant here, plain texts, a user's last.")
        try:
            return prompter.prompt_ids(prompt)
        except UserError as error:
            raise RefusedError(str(error)) from error

    async def _grown(
        self, scope: Any, prompts: Sequence[list[int]], request: Request, text: _Text
    ) -> AsyncGenerator[_Delta]:
        """The response as it grows; begun again behind the last good token where a lane was lost.

        Raises:
            RefusedError: vLLM refuses a lane, as it does where the context is too short.
            RuntimeError: it was begun too often.
        """
        adapters = {name: alpha for name, alpha in request.arms.items() if name in self._adapters}
        weights, guides = {"": request.base_weight, **adapters}, request.arms.keys() - adapters.keys()
        for part in range(_PARTS):
            # Where the law itself draws a mark, it is none in the next part.
            mark, first = self._marks[part % 2], len(text.tokens)
            told = {
                "group": uuid.uuid4().hex, "lanes": len(weights), "mark": mark, "first": first,
                "last": request.max_new_tokens, "stream": request.stream, "temperature": request.temperature,
                "top_k": request.top_k, "top_p": request.top_p, "min_p": request.min_p,
            }  # fmt: skip
            of_guides = {
                "prompts": [[*ids, *text.tokens] for ids in prompts[1:]],
                "guides": {name: request.arms[name] for name in guides},
            }
            body = {
                "prompt": [*prompts[0], *text.tokens], "max_tokens": request.max_new_tokens - first, "temperature": 0.0,
                "stop_token_ids": [mark], "return_token_ids": True, "stream": True,
            }  # fmt: skip
            lanes = [
                {
                    **body,
                    "model": name or self._base,
                    "vllm_xargs": {
                        EXTRA: json.dumps({**told, **({} if place else of_guides), "lane": place, "alpha": alpha})
                    },
                }
                for place, (name, alpha) in enumerate(weights.items())
            ]
            others = [asyncio.ensure_future(self._read(scope, lane)) for lane in lanes[1:]]
            try:
                async with contextlib.aclosing(self._asked(scope, "/v1/completions", lanes[0], others)) as chunks:
                    async for choice in _choices(chunks):
                        finish, tokens = choice.get("finish_reason"), list(choice.get("token_ids") or [])
                        lost = finish == "stop" and choice.get("stop_reason") == mark
                        if lost and tokens and tokens[-1] == mark:
                            tokens = tokens[:-1]
                        ended = finish is not None and not lost
                        grown = text.grown(tokens, ended)
                        if text.stopped or ended:
                            yield _Delta(grown, "stop" if text.stopped else finish)
                            return
                        if grown:
                            yield _Delta(grown)
            finally:
                for other in others:
                    other.cancel()
                await asyncio.gather(*others, return_exceptions=True)
        raise RuntimeError(
            f"a guided request was begun {_PARTS} times and lost a lane each time: its lanes do not fit into vLLM's "
            "cache or into one step (--max-num-batched-tokens), or a model's logits are not finite (dtype float32)."
        )

    async def _read(self, scope: Any, body: Mapping[str, Any]) -> None:
        async for _ in self._asked(scope, "/v1/completions", body):
            pass

    async def _asked(
        self, scope: Any, path: str, body: Mapping[str, Any], beside: Sequence[asyncio.Future[None]] = ()
    ) -> AsyncGenerator[bytes]:
        """The chunks of the application's own answer; leaving early disconnects, which makes vLLM abort the lane.

        What fails `beside` it, fails it too: a lane would wait for one that was refused.

        Raises:
            RefusedError: the answer is an error; its message.
        """
        raw, asked, gone = json.dumps(body).encode(), False, asyncio.Event()
        answers: asyncio.Queue[Any] = asyncio.Queue()
        headers = [
            (name, value) for name, value in scope["headers"] if name not in (b"content-length", b"content-type")
        ]
        headers += [(b"content-length", str(len(raw)).encode()), (b"content-type", b"application/json")]
        inner = {**scope, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers, "state": {}}

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": raw, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(inner, receive, answers.put)
            finally:
                await answers.put(None)

        def fail(other: asyncio.Future[None]) -> None:
            if not other.cancelled() and other.exception() is not None:
                answers.put_nowait(other.exception())

        for other in beside:
            other.add_done_callback(fail)
        task = asyncio.ensure_future(run())
        status, refusal = 200, b""
        try:
            while (message := await answers.get()) is not None:
                if isinstance(message, Exception):
                    raise message
                status = message.get("status", status)
                if status != 200:
                    refusal += message.get("body", b"")
                elif chunk := message.get("body"):
                    yield chunk
            await task
        finally:
            gone.set()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        if status != 200:
            try:
                said = json.loads(refusal)["error"]
                said = said["message"] if isinstance(said, dict) else said
            except (ValueError, KeyError, TypeError):
                said = refusal.decode(errors="replace")
            raise RefusedError(str(said), status)


class _Answer:
    """A response in the shape of OpenAI's API."""

    def __init__(self, kind: str, model: str, prompt_tokens: int) -> None:
        self._chat, self._prompt_tokens = kind == "chat.completion", prompt_tokens
        self._head = {"id": f"guided-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
        self._begun = False

    def whole(self, deltas: Sequence[_Delta], tokens: int) -> dict[str, Any]:
        """All of it at once."""
        text = "".join(delta.text for delta in deltas)
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, "logprobs": None, "finish_reason": deltas[-1].finish, **content}
        return {**self._head, "choices": [choice], "usage": self._usage(tokens)}

    def event(self, delta: _Delta) -> dict[str, Any]:
        """A piece of it."""
        content: dict[str, Any] = {"text": delta.text}
        if self._chat:
            content = {"delta": {**({} if self._begun else {"role": "assistant"}), "content": delta.text}}
        self._begun = True
        return self._chunk([{"index": 0, "logprobs": None, "finish_reason": delta.finish, **content}])

    def used(self, tokens: int) -> dict[str, Any]:
        """The last piece where the client wants to know."""
        return {**self._chunk([]), "usage": self._usage(tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, **({"object": "chat.completion.chunk"} if self._chat else {}), "choices": choices}

    def _usage(self, tokens: int) -> dict[str, int]:
        before = self._prompt_tokens
        return {"prompt_tokens": before, "completion_tokens": tokens, "total_tokens": before + tokens}


async def _choices(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The choices of the events in vLLM's answer, which sends whole events."""
    async for chunk in chunks:
        for line in chunk.decode().splitlines():
            if line.startswith("data: ") and line != "data: [DONE]":
                said = json.loads(line.removeprefix("data: "))
                if "error" in said:
                    raise RuntimeError(str(said["error"].get("message", said)))
                for choice in said["choices"]:
                    yield choice


def _spelled(messages: Any) -> str | None:
    """Messages as the one text that they are everywhere else here; None where they cannot be one."""
    try:
        return spelled(messages)
    except (UnfitError, AttributeError, KeyError, TypeError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max


def _event(said: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {json.dumps(said)}\n\n".encode(), "more_body": True}


def _start(status: int, kind: bytes) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def _told(message: str, status: int) -> dict[str, Any]:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return {"error": {"message": message, "type": kind, "code": status}}


async def _refuse(send: Any, message: str, status: int = 400) -> None:
    await _respond(send, status, json.dumps(_told(message, status)).encode())


async def _respond(send: Any, status: int, body: bytes) -> None:
    await send(_start(status, b"application/json"))
    await send({"type": "http.response.body", "body": body})


def _replayed(body: bytes, receive: Any) -> Any:
    """The request's body once more, for the application behind us."""
    told = False

    async def again() -> Any:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _left(receive: Any) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
