"""Guided requests in vLLM's own OpenAI-compatible server: one of its endpoint plugins, named by `VLLM_PLUGINS`.

The routes replace vLLM's for completions, chat completions and the list of models. Requests are read by vLLM's own
classes, behind its API key and its check that a body is JSON; one without `guidance` goes on to vLLM's own handler.
"""

import json
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.exceptions import VLLMValidationError

from pipeline.config.errors import UserError
from pipeline.decoding.vllm import answers
from pipeline.decoding.vllm.adapters import Adapters
from pipeline.decoding.vllm.compilation import FormatError, GrammarCompiler
from pipeline.decoding.vllm.grammar import token_info
from pipeline.decoding.vllm.guides import from_json
from pipeline.decoding.vllm.reload import Reload
from pipeline.decoding.vllm.requests import GuidedChat, GuidedCompletion, Models, read_format, read_jobs
from pipeline.decoding.vllm.response import Responder
from pipeline.decoding.vllm.settings import SERVE
from pipeline.models.loading import Source

_LARGEST_BODY = 8 * 2**20  # bytes
_LARGEST_INTEGER = 2**31 - 1  # vLLM keeps such numbers in tensors of 32 bits, and does not look before
_WIDE = ("seed", "priority")  # these in 64, and it does
_GUIDED = ("/v1/completions", "/v1/chat/completions")
deaths: list[Any] = []  # engines that died


class GuidedRoutes:
    """The plugin as vLLM loads it."""

    name = "genarm_server"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, which replace vLLM's of the same paths, and what guards all others."""
        for route in app.routes:
            if isinstance(route, APIRoute) and "POST" in (route.methods or ()):
                check = get_parameterless_sub_dependant(depends=Depends(_check_body), path=route.path)
                route.dependant.dependencies.insert(0, check)
        app.add_middleware(BoundedBodies)
        checks = [Depends(validate_json_request), Depends(_check_body)]
        app.post("/v1/chat/completions", dependencies=checks, response_model=None)(create_chat_completion)
        app.post("/v1/completions", dependencies=checks, response_model=None)(create_completion)
        app.get("/v1/models", response_model=None)(show_models)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Load tokenizers and templates."""
        described = json.loads(os.environ[SERVE])
        models = Models(described, engine_client.model_config)
        adapters = {
            name: adapter
            for name, adapter in state.openai_serving_models.lora_requests.items()
            if name in models.adapters
        }
        state.guided_models = models
        state.guided_grammars = GrammarCompiler(partial(token_info, engine_client.vllm_config))
        lanes = Adapters(adapters, [from_json(side) for side in described["guides"]])
        state.guided_responder = Responder(engine_client, lanes, models.tokenizer, models.groups)
        if adapters:
            folders = {name: Path(folder) for name, folder in described["adapters"].items()}
            base = Source(Path(described["folder"]), described["template"])
            Reload(
                state.guided_responder, state.openai_serving_models, folders, Path(described["versions"]), base,
                described["rank"],
            ).on_hangup()  # fmt: skip
        _note_death(engine_client)


class BoundedBodies:
    """Stops reading a body that is too large; inside vLLM's check of the key, and so behind it."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        """Count the bytes of a request as they come."""
        size = 0

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > _LARGEST_BODY:
                raise HTTPException(413, f"the body has more than {_LARGEST_BODY} bytes.")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)


async def _check_body(raw_request: Request) -> None:
    """Refuse what vLLM lets through: `guidance` where nothing reads it, and integers that end its engine.

    Raises:
        VLLMValidationError: one of these, or a body that is not JSON.
    """
    if "json" not in raw_request.headers.get("content-type", ""):
        return
    try:
        body = await raw_request.json()
        json.dumps(body, ensure_ascii=False).encode()  # half of a character that is written in two has no bytes
    except (ValueError, RecursionError) as error:
        raise VLLMValidationError(f"the body is not JSON that can be read: {error}") from error
    if not isinstance(body, dict):
        return
    path, params = raw_request.url.path, body.get("sampling_params")
    if body.get("guidance") is not None and not path.endswith(_GUIDED):
        raise VLLMValidationError(f"guidance is for {' and '.join(_GUIDED)}, not for {path}.", parameter="guidance")
    for name, value in [*body.items(), *(params.items() if isinstance(params, dict) else ())]:
        if isinstance(value, int) and abs(value) > _LARGEST_INTEGER and name not in _WIDE:
            raise VLLMValidationError(f"{name} has more than 32 bits.", parameter=name)


async def create_chat_completion(request: GuidedChat, raw_request: Request) -> Response | None:
    """Answer a chat, guided or not."""
    if request.guidance is None:
        await _grammar(request, raw_request)  # refused here, and not inside the engine
        plain: Response | None = await chat_router.create_chat_completion(request, raw_request)
        return plain
    guided: Response | None = await _guided(request, raw_request)
    return guided


async def create_completion(request: GuidedCompletion, raw_request: Request) -> Response | None:
    """Go on from a prompt, guided or not."""
    if request.guidance is None:
        await _grammar(request, raw_request)
        plain: Response | None = await completion_router.create_completion(request, raw_request)
        return plain
    guided: Response | None = await _guided(request, raw_request)
    return guided


async def show_models(raw_request: Request) -> JSONResponse:
    """vLLM's list, in which the base names its ARMs: adapters are models of their own too, others are not."""
    models, state = await raw_request.app.state.openai_serving_models.show_available_models(), raw_request.app.state
    for card in models.data:
        if card.id == state.guided_models.base:
            card.arms = state.guided_models.arms
    return JSONResponse(models.model_dump())


@with_cancellation
@load_aware_call
async def _guided(request: GuidedChat | GuidedCompletion, raw_request: Request) -> Response:
    state = raw_request.app.state
    try:
        jobs = read_jobs(request, state.guided_models)
    except UserError as error:
        raise VLLMValidationError(str(error)) from error
    if (grammar := await _grammar(request, raw_request)) is not None:
        jobs = [replace(job, shaping=replace(job.shaping, grammar=grammar)) for job in jobs]
    answer = answers.Answer(request, state.guided_models.base, len(jobs[0].prompt), state.guided_models.tokenizer)
    responses = [state.guided_responder.write(job) for job in jobs]
    if request.stream:
        return StreamingResponse(answer.events(responses), media_type="text/event-stream")
    return JSONResponse((await answer.whole(responses)).model_dump())


async def _grammar(request: GuidedChat | GuidedCompletion, raw_request: Request) -> str | None:
    """The compiled format that a request asks for; None without one."""
    try:
        format_ = read_format(request)
        return None if format_ is None else await raw_request.app.state.guided_grammars.compile(*format_)
    except (UserError, FormatError) as error:
        raise VLLMValidationError(str(error)) from error


def _note_death(engine: Any) -> None:
    """Note, the first time that vLLM shuts its engine down, whether it was dead before."""
    shutdown = engine.shutdown

    def noted(*args: Any, **kwargs: Any) -> Any:
        engine.shutdown = shutdown
        if engine.errored:
            deaths.append(engine)
        return shutdown(*args, **kwargs)

    engine.shutdown = noted
