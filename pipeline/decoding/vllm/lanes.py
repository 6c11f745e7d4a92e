"""The lanes of a guided request, as the frontends hand them to vLLM: a request for the base and one for each adapter.

What a lane tells the processor and the scheduler travels in `SamplingParams.extra_args`. vLLM's HTTP API lets clients
write there too (`vllm_xargs`), and the processor trusts what it reads: a number out of its range would end the engine
for everybody. So each lane carries a seal that only this process can write, and the processor refuses all others at
vLLM's door, whatever the route they came by.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from pipeline.decoding.request import Request
from pipeline.decoding.vllm.settings import EXTRA

_SEAL = secrets.token_hex(16)  # vLLM validates a request in the process that made it, so that other processes need none


@dataclass(frozen=True)
class Shaping:
    """What changes the guided law beside weights, temperature and truncation; OpenAI's definitions."""

    presence_penalty: float = 0.0  # taken off the sum at tokens that the response holds, before the temperature
    frequency_penalty: float = 0.0  # the same, as often as they are in it
    min_tokens: int = 0  # that are drawn before one of `stop_token_ids` can be
    stop_token_ids: tuple[int, ...] = ()  # that end a response
    top_logprobs: int | None = None  # likeliest tokens whose log-probabilities are kept; None: nothing is kept
    grammar: str | None = None  # that the response keeps to, as `compilation.GrammarCompiler` returns it


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`extra_args` of a lane."""
    return {EXTRA: {**facts, "seal": _SEAL}}


def facts_of(params: Any) -> dict[str, Any] | None:
    """What a lane tells; None for any other request."""
    facts: dict[str, Any] | None = (getattr(params, "extra_args", None) or {}).get(EXTRA)
    return facts


def check_seal(facts: Any) -> None:
    """Refuse what this process did not write.

    Raises:
        ValueError: the seal is missing.
    """
    if not isinstance(facts, dict) or facts.get("seal") != _SEAL:
        raise ValueError(f"{EXTRA!r} in vllm_xargs is internal: send `guidance` beside `messages` or `prompt`.")


def lane_params(
    group: str, request: Request, alphas: Mapping[str, float], shaping: Shaping, *, mark: int, first: int,
    guides: Mapping[str, float], prompts: Sequence[Sequence[int]], sums: bool = False, output: RequestOutputKind,
) -> list[SamplingParams]:  # fmt: skip
    """Sampling parameters of a group's lanes, the base's first.

    Args:
        group: its name, which no other group has.
        request: what is sampled; its weights are not read, since they are `alphas` and `guides`.
        alphas: α of each lane by its model's name, the base's first.
        mark: the token that ends the lanes of a group that is not whole.
        first: tokens of the response that the prompts hold already, because the group was begun before.
        guides: α of models beside the engine.
        prompts: the prompt of each of these, in token ids.
        sums: whether log-probabilities and KL are summed over the response.
        output: what the base's lane gives back; the others' is their end.
    """
    facts = {
        "group": group, "lanes": len(alphas), "mark": mark, "first": first, "last": request.max_new_tokens,
        "stream": request.stream, "temperature": request.temperature, "top_k": request.top_k,
        "top_p": request.top_p, "min_p": request.min_p, "sums": sums, **asdict(shaping),
    }  # fmt: skip
    of_base = {"guides": dict(guides), "prompts": [list(prompt) for prompt in prompts]}
    of_others = {"grammar": None}  # it is long, and the base's lane speaks for the group
    return [
        SamplingParams(
            temperature=0.0, max_tokens=request.max_new_tokens - first, ignore_eos=True, detokenize=False,
            stop_token_ids=[*shaping.stop_token_ids, mark],
            output_kind=RequestOutputKind.FINAL_ONLY if lane else output,
            extra_args=sealed(
                {**facts, **(of_others if lane else of_base), "lane": lane, "model": model, "alpha": alpha}
            ),
        )
        for lane, (model, alpha) in enumerate(alphas.items())
    ]  # fmt: skip
