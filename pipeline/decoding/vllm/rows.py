"""The rows of vLLM's batch that belong to guided requests, and the index tensors that `processor` makes of them.

Shapes: N rows in whole groups, G groups, T steps, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.decoding.guidance import random_stream
from pipeline.decoding.vllm.grammar import Grammars, Matcher
from pipeline.decoding.vllm.logprobs import TokenLogprobs


@dataclass(frozen=True, eq=False)
class Lane:
    """One lane's row of the batch."""

    group: str
    lane: int  # 0 is the base
    lanes: int  # of the group
    model: str  # whose it is
    alpha: float
    mark: int
    sums: bool
    temperature: float  # 0 is greedy
    top_k: int
    top_p: float
    min_p: float
    prompts: Sequence[Sequence[int]]  # of the guides
    guides: Mapping[str, float]  # their α
    uniforms: np.ndarray  # that draw the group's tokens, from this part's first on
    before: Sequence[int]  # tokens of the response that the prompt holds, since the group was begun before
    presence_penalty: float
    frequency_penalty: float
    min_tokens: int
    stop_token_ids: Sequence[int]
    top_logprobs: int | None
    matcher: Matcher | None  # of the grammar that the response keeps to
    output: Sequence[int]  # what vLLM has kept: it grows as tokens are drawn

    @property
    def drawn(self) -> Sequence[int]:
        """The response so far."""
        return [*self.before, *self.output]


@dataclass
class Plan:
    """The index tensors of a batch, until it changes."""

    rows_N: Tensor  # group by group, the base's lane first
    group_N: Tensor
    alpha_N: Tensor  # over the temperature
    starts_G: Tensor  # where each group begins in these
    base_G: Tensor  # rows of the base lanes
    names: list[str | None]  # of groups whose sums are kept
    top_k_G: Tensor
    top_p_G: Tensor
    min_p_G: Tensor
    cutting: bool
    uniforms_GT: Tensor
    lanes: list[Lane]  # of the base, per group
    lengths: list[int]  # tokens that each of these had drawn when the plan was made
    counts: dict[int, Tensor]  # of groups with penalties: how often each token is in the response
    sums_G3: Tensor
    mark_G: Tensor
    lost: Tensor  # rows whose group is not whole
    marks: Tensor
    steps: int = 0  # drawn since
    last_G3: Tensor | None = None  # what the last step adds to the sums, once its tokens are known to be kept
    records: dict[str, TokenLogprobs] = field(default_factory=dict)  # of the last step, likewise


def lane_of(facts: Mapping[str, Any], prompt: Sequence[int], output: Sequence[int], grammars: Grammars) -> Lane:
    """A lane of what it tells, its prompt and its response."""
    lane, first = facts["lane"], facts["first"]
    # Only the base's lane draws, and speaks for the guides.
    uniforms = np.empty(0) if lane else random_stream(facts["stream"], facts["last"])[first:]
    names = [each.name for each in fields(Lane)]
    grammar = facts["grammar"]
    computed = {
        "uniforms": uniforms,
        "before": list(prompt[len(prompt) - first :]),
        "output": output,
        "matcher": None if grammar is None else grammars.matcher(grammar, facts["stop_token_ids"]),
    }
    return Lane(**{"prompts": (), "guides": {}, **{name: facts[name] for name in names if name in facts}, **computed})
