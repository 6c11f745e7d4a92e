"""Bodies that no client library writes: a valid request with fields broken, bytes changed, or ends cut off."""

import json
import random

_VALUES = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e-320, 1e308, float("inf"), float("nan"), "",
    "a", "\ud83d", "\x00", "\u2028", [], {}, [[]], [2**63], {"a": {}}, [None], "0" * 5000, ["a"] * 100, -0.0, 0.5,
]  # fmt: skip
_FORMATS = [
    {"regex": "("}, {"regex": "(a?){200}"}, {"regex": "[a-z]{1,40}|\ud83d"}, {"choice": []},
    {"choice": ["a", "\u2028"]}, {"grammar": "root ::= root"}, {"grammar": 'root ::= "a" root | "b"'},
    {"json": "{"}, {"json": {"type": "nothing"}}, {"json": {"$ref": "#"}}, {"json": {"enum": []}},
    {"json_object": False}, {"type": "json_object"}, {"type": "text"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "minItems": 10**9}}},
    {"type": "json_schema"}, {"type": "structural_tag", "format": {}}, {"structural_tag": "{}"},
]  # fmt: skip
_FIELDS = [
    "temperature", "top_k", "top_p", "min_p", "max_tokens", "max_completion_tokens", "n", "seed", "stop", "stream",
    "stream_options", "stop_token_ids", "ignore_eos", "min_tokens", "presence_penalty", "frequency_penalty", "logprobs",
    "top_logprobs", "chat_template_kwargs", "guidance", "model", "messages", "prompt", "vllm_xargs", "user",
    "logit_bias", "response_format", "structured_outputs", "tools", "echo", "priority", "bad_words",
    "allowed_token_ids", "request_id", "repetition_penalty",
]  # fmt: skip


def fuzzed(number: int, model: str = "tiny") -> bytes:
    """The body of this number: always the same."""
    draw = random.Random(number)
    body = {
        "model": model, "max_tokens": draw.randint(1, 6), "seed": number, "prompt": "Hello",
        "messages": [{"role": "user", "content": "Hello"}],
        "guidance": {"weights": {"positivity": draw.choice([1.0, 0, -1, *_VALUES])}},
    }  # fmt: skip
    if draw.random() < 0.2:
        del body["guidance"]
    for _ in range(draw.randint(1, 3)):
        body[draw.choice(_FIELDS)] = draw.choice(_VALUES)
    if draw.random() < 0.2:
        body[draw.choice(["response_format", "structured_outputs"])] = draw.choice(_FORMATS)
    raw = bytearray(json.dumps(body).encode())
    if draw.random() < 0.15:
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    return bytes(raw[: draw.randrange(len(raw))] if draw.random() < 0.05 else raw)
