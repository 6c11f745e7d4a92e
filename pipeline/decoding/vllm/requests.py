"""Guided requests as clients of the OpenAI API write them: vLLM's own classes with one field more, and what they mean.

vLLM's classes and its `SamplingParams` check what they know; here is checked what they don't, and every number has a
bound before anything is allocated for it.
"""

import inspect
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import check_json_nesting
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features
from vllm.v1.structured_output.request import get_structured_output_key
from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

from pipeline.config.errors import UserError
from pipeline.config.points import BASE
from pipeline.data.chat import UnfitError, spelled
from pipeline.decoding.request import Request
from pipeline.decoding.vllm.guides import from_json
from pipeline.decoding.vllm.lanes import Shaping
from pipeline.decoding.vllm.response import Job
from pipeline.models.mixtures import lanes_of_weights, mixtures_of
from pipeline.models.prompting import Prompter

_LARGEST_ALPHA = 1000.0  # float32 logits of any size that a model gives stay finite under it
_MOST_STOP_IDS = 64
_SUPPORTED = {
    "model", "messages", "prompt", "guidance", "temperature", "top_k", "top_p", "min_p", "max_tokens", "n",
    "max_completion_tokens", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "stream", "stream_options",
    "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs", "chat_template_kwargs", "user", "request_id",
    "add_special_tokens", "response_format", "structured_outputs",
}  # fmt: skip
# What a client may write where it changes nothing, beside a field's own default.
_NEUTRAL: dict[str, Any] = {"best_of": 1, "repetition_penalty": 1, "tool_choice": "auto"}

Alpha = Annotated[float, Field(strict=True, ge=-_LARGEST_ALPHA, le=_LARGEST_ALPHA, allow_inf_nan=False)]


class Guidance(BaseModel):
    """α of each ARM, of any sign; `base` weighs 1 where it is not named."""

    model_config = ConfigDict(extra="forbid")
    weights: dict[str, Alpha]


class _Readable(BaseModel):
    """Refuses what ends vLLM's own validators, which read fields before their types are checked."""

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_other_types(cls, body: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validate(body)
        except (AttributeError, TypeError) as error:
            raise VLLMValidationError(f"a field's value is of another type than it can have: {error}.") from error


class GuidedChat(_Readable, ChatCompletionRequest):
    """A chat with `guidance`."""

    field_names: ClassVar[set[str] | None] = None  # which vLLM computes once per class
    guidance: Guidance | None = None


class GuidedCompletion(_Readable, CompletionRequest):
    """A completion with `guidance`."""

    field_names: ClassVar[set[str] | None] = None
    guidance: Guidance | None = None


class Models:
    """What a server serves.

    Args:
        described: what the launcher wrote.
        config: vLLM's, of the base.
    """

    def __init__(self, described: Mapping[str, Any], config: Any) -> None:
        self.base, self.groups, self.adapters = described["base"], described["groups"], list(described["adapters"])
        folder = Path(described["folder"])
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        beside = [from_json(side) for side in described["guides"]]
        folders = {name: Path(folder) for side in beside for name, folder in side.adapters.items()}
        folders |= {name: Path(folder) for name, folder in described["adapters"].items()}
        self.mixtures = mixtures_of(folders)
        self.arms = [*self.adapters, *(name for side in beside for name in side.names)]
        # Without a template a base can still go on from prompts; with either, it is prompted as in training.
        templated = described["template"] is not None or self.tokenizer.chat_template
        self._base_prompter = Prompter(self.tokenizer, described["template"]) if templated else None
        self._guides = [(side.source.prompter(), side.source.context) for side in beside]
        self.ends, self.marks = frozenset(described["ends"]), described["marks"]
        self.config, self.context = config, int(config.max_model_len)

    def prompts(self, request: GuidedChat | GuidedCompletion) -> list[list[int]]:
        """The prompt in token ids, as the base and then each guide reads it.

        Raises:
            UserError: no prompt, several of them, one that a template does not take, or a token of no vocabulary.
        """
        if isinstance(request, GuidedCompletion):
            ids = self._completion(request)
            return [ids, *(ids for _ in self._guides)]
        if self._base_prompter is None:
            raise UserError(f"{self.base} has no chat template: use /v1/completions, or set the model's template.")
        prompt, options = chat_prompt(request.messages), template_options(request.chat_template_kwargs, self.tokenizer)
        prompters = [self._base_prompter, *(prompter for prompter, _ in self._guides)]
        return [prompter.prompt_ids(prompt, options) for prompter in prompters]

    def _completion(self, request: GuidedCompletion) -> list[int]:
        prompt: Any = request.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt, add_special_tokens=request.add_special_tokens).input_ids)
        if not isinstance(prompt, list) or not all(isinstance(token, int) for token in prompt):
            raise UserError("a guided request has one prompt, a text or token ids.")
        if not all(0 <= token < len(self.tokenizer) for token in prompt):
            raise UserError(f"a prompt's tokens are below {len(self.tokenizer)}.")
        return prompt

    def room(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens a response can have.

        Raises:
            UserError: none, or the prompt is empty.
        """
        if not all(prompts):
            raise UserError("the prompt is empty.")
        contexts = [self.context, *(context for _, context in self._guides)]
        room = min(context - len(ids) for context, ids in zip(contexts, prompts, strict=True))
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompts[0])} tokens, and the models read {min(contexts)}: shorten it."
            )
        return room


def read_jobs(request: GuidedChat | GuidedCompletion, models: Models) -> list[Job]:
    """The responses that a request is for, checked.

    Raises:
        UserError: something that guided requests cannot have, or a number out of its range.
        VLLMValidationError: the same, as vLLM's own classes say it.
    """
    weights = _weights(request, models)
    chat = isinstance(request, GuidedChat)
    prompts = models.prompts(request)
    room = models.room(prompts)
    most = request.max_completion_tokens if chat else None
    most = request.max_tokens if most is None else most
    most = room if most is None else most
    if not 1 <= most <= room:
        raise UserError(f"max_tokens is {most}, and between 1 and {room} fit behind the prompt.")
    params = request.to_sampling_params(most, {})
    params.verify(models.config, None, None, models.tokenizer)
    structured = params.structured_outputs
    if structured is not None and (params.min_tokens or params.ignore_eos):
        raise UserError("a response ends where its format does: it cannot have min_tokens or ignore_eos.")
    if params.n > models.groups:
        raise UserError(f"n is {params.n}, and the server writes {models.groups} responses at once (--groups).")
    # The prompt as `GuidedDecoder` knows it, so that the same seed writes the same text.
    prompt = chat_prompt(request.messages) if chat else repr(request.prompt)
    sampled = Request(
        prompt, weights, temperature=params.temperature, top_k=min(max(params.top_k, 0), len(models.tokenizer)),
        top_p=params.top_p, min_p=params.min_p, max_new_tokens=most, stop=tuple(params.stop),
        seed=secrets.randbits(62) if params.seed is None else params.seed,
    )  # fmt: skip
    shaping = _shaping(request, params, models)
    mark = tuple(token for token in models.marks if token not in shaping.stop_token_ids)[:2]
    return [
        Job(replace(sampled, sample=sample), shaping, prompts[0], prompts[1:], models.ends, mark)
        for sample in range(params.n)
    ]


def read_format(request: GuidedChat | GuidedCompletion) -> tuple[str, str] | None:
    """The format that a request asks for, as `GrammarCompiler.compile` takes it; None without one.

    Raises:
        UserError: it is of no kind that can be compiled.
        VLLMValidationError: the same, as vLLM's own classes say it.
    """
    structured = request.extract_structured_outputs()
    if structured is None:
        return None
    if structured.json_object is False or structured.choice == []:
        raise UserError("json_object is true where it is there, and choice has choices.")
    check_json_nesting(structured.json)
    check_json_nesting(structured.structural_tag, structural_tag=True)
    kind, text = get_structured_output_key(structured)
    try:
        if kind == StructuredOutputOptions.JSON and has_xgrammar_unsupported_json_features(json.loads(text)):
            raise UserError("the schema uses something that xgrammar does not know: simplify it.")
        if kind == StructuredOutputOptions.CHOICE:
            return "grammar", choice_as_grammar(json.loads(text))
    except ValueError as error:
        raise UserError(f"the format cannot be read: {error}") from error
    if kind == StructuredOutputOptions.JSON_OBJECT:
        return "json", '{"type": "object"}'
    if kind == StructuredOutputOptions.GRAMMAR and grammar_is_likely_lark(text):
        return "lark", text
    return kind.name.lower(), text


def _shaping(request: GuidedChat | GuidedCompletion, params: SamplingParams, models: Models) -> Shaping:
    if len(params.stop_token_ids) > _MOST_STOP_IDS:
        raise UserError(f"a guided request has at most {_MOST_STOP_IDS} stop_token_ids.")
    ends = () if params.ignore_eos else tuple(sorted(models.ends))
    top: int | None = params.logprobs
    if isinstance(request, GuidedChat) and not request.logprobs:
        top = None
    return Shaping(
        params.presence_penalty, params.frequency_penalty, params.min_tokens,
        tuple(dict.fromkeys((*ends, *params.stop_token_ids))),
        len(models.tokenizer) if top == -1 else top,
    )  # fmt: skip


def _weights(request: GuidedChat | GuidedCompletion, models: Models) -> dict[str, float]:
    """The weights of a request, once nothing in it would be left out of the answer without a word.

    Raises:
        UserError: an unknown ARM, or something that lanes cannot do.
    """
    fields = type(request).model_fields
    for name in (*request.model_fields_set, *(request.model_extra or {})):
        value = getattr(request, name)
        default = fields[name].get_default(call_default_factory=True) if name in fields else None
        neutral = value in (None, False, [], {}, default, _NEUTRAL.get(name)) or getattr(value, "type", None) == "text"
        if name not in _SUPPORTED and not neutral:
            raise UserError(f"a guided request cannot have {name}.")
    if request.model not in (None, models.base):
        raise UserError(f"a guided request is to the base, {models.base}: its weights name the ARMs.")
    weights = request.guidance.weights if request.guidance else {}
    for name in weights:
        if name not in (*models.arms, BASE):
            raise UserError(f"weights name {name}, but the ARMs are {', '.join(models.arms)}.")
    lanes_of_weights({name: weight for name, weight in weights.items() if weight and name != BASE}, models.mixtures)
    return weights


def chat_prompt(messages: Sequence[Any]) -> str:
    """Messages as the one text that they are in training and everywhere else here.

    Raises:
        UserError: they cannot be one.
    """
    turns = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
            content = "\n".join(str(part["text"]) for part in content)
        if not isinstance(content, str):
            raise UserError("messages are plain texts here.")
        turns.append({"role": message["role"], "content": content})
    try:
        return spelled(turns)
    except UnfitError as error:
        raise UserError(f"messages are turns of system, user and assistant, a user's last, and not {error}.") from error


def template_options(
    options: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, bool | float | str | None]:
    """Variables for a chat template, such as `enable_thinking`.

    Raises:
        UserError: the name of an argument of the tokenizer, or a value that is neither a text, a number nor a truth.
    """
    reserved = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map}
    options = dict(options or {})
    for name, value in options.items():
        if name in reserved or not isinstance(value, str | bool | int | float | None):
            raise UserError(f"chat_template_kwargs cannot have {name}={value!r}.")
    return options
