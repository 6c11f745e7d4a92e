"""What runs inside vLLM: a batch-level logits processor that makes lanes of one group draw from the guided law.

A guided request is a group of *lanes*: the same prompt, once for the base and once per ARM (a LoRA adapter of the
base). The processor sums their logits, Σ_i α_i x_i / T: what normalises each lane is one constant per row, which the
softmax behind takes up, so this is the guided law (`pipeline.decoding.guidance.guided_logps`). It cuts and draws as
`GuidedDecoder` does, from the row's own random stream, and gives all lanes the token that was drawn; to vLLM they are
greedy. So the lanes stay in step, vLLM samples nothing twice, and in float32 a text is the one that `GuidedDecoder`
writes.

ARMs that are no adapters of the base have no lane here, but a row in `guides`, which adds to the same sum.

A lane can be missing all the same (scheduled later, preempted, aborted). Those present then must not go on with what is
no guided law: they are given the *mark*, a token that ends them at once and that tells the frontend to go on from the
last good token. Nothing but tokens passes between processor and frontend, so they may be on different machines.

Shapes: B rows of the batch, N of them in whole groups, G groups, V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from pipeline.decoding.guidance import cut, draw, kl_divergence, normalised, random_stream, truncate
from pipeline.decoding.vllm.guides import Guided, Guides
from pipeline.decoding.vllm.settings import EXTRA


@dataclass(frozen=True)
class Lane:
    """One lane's row of the batch."""

    group: str
    lane: int  # 0 is the base
    lanes: int  # of the group
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
    output: Sequence[int]  # vLLM's own list: it grows as tokens are drawn


@dataclass
class _Plan:
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
    steps: int
    sums_G3: Tensor
    mark_G: Tensor
    lost: Tensor  # rows whose group is not whole
    marks: Tensor


class LaneProcessor(LogitsProcessor):
    """Registered with an engine as `pipeline.decoding.vllm.processor:LaneProcessor`.

    Raises:
        ValueError: the engine is configured so that lanes could fall out of step unseen.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        scheduler = vllm_config.scheduler_config
        if scheduler.enable_chunked_prefill:
            raise ValueError("guided lanes need whole prompts: start vLLM with --no-enable-chunked-prefill.")
        if scheduler.async_scheduling:
            raise ValueError("guided lanes need each token in time: start vLLM with --no-async-scheduling.")
        told = vllm_config.additional_config[EXTRA]
        self._device = device
        self._guides = Guides(told["guides"], device)
        self._vocab_size = min([int(told["vocab_size"]), *self._guides.vocab_sizes])
        self._rows: dict[int, Lane] = {}
        self._plan: _Plan | None = None
        self._changed = False
        self.sums: dict[str, list[float]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse lanes that are not spelled as the frontend spells them.

        Raises:
            ValueError: a fact is missing or of the wrong type, or vLLM is to sample by itself.
        """
        told = (sampling_params.extra_args or {}).get(EXTRA)
        if told is None:
            return
        try:
            _lane(told, ())
            most = int(facts(told)["last"]) - int(facts(told)["first"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"extra_args[{EXTRA!r}] is no lane of a guided request: {error!r}") from error
        if sampling_params.temperature != 0:
            raise ValueError("a guided lane is greedy to vLLM: its temperature belongs into extra_args.")
        if sampling_params.max_tokens is None or sampling_params.max_tokens > most:
            raise ValueError(f"a guided lane has max_tokens={sampling_params.max_tokens}, and its group draws {most}.")

    def is_argmax_invariant(self) -> bool:
        """No: it says which token is the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows of the batch."""
        if batch_update is None:
            return
        self.settle()
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, output in batch_update.added:
            self._rows.pop(index, None)
            if told := (params.extra_args or {}).get(EXTRA):
                self._rows[index] = _lane(told, output)
        for one, two, direction in batch_update.moved:
            first, second = self._rows.pop(one, None), self._rows.pop(two, None)
            if first is not None:
                self._rows[two] = first
            if second is not None and direction == MoveDirectionality.SWAP:
                self._rows[one] = second
        self._plan, self._changed = None, True

    def apply(self, logits: Tensor) -> Tensor:
        """Make the drawn token the likeliest of every lane of a whole group, and the mark where one is missing."""
        if self._changed:
            self._plan, self._changed = self._planned(), False
        plan = self._plan
        if plan is None:
            return logits
        if plan.names:
            seen = cut(logits, self._vocab_size)
            # No row adds to another group, not even 0 times what it has: another request's may be −inf (a grammar, a
            # shortest length), or an overflow, and 0 · −inf is no number.
            total_GV = F.embedding_bag(
                plan.rows_N, seen, plan.starts_G, mode="sum", per_sample_weights=plan.alpha_N
            )  # fmt: skip
            for rows_g, alpha_g, values_gV in self._guides.read():
                total_GV.index_add_(0, rows_g, cut(values_gV, self._vocab_size).to(total_GV) * alpha_g[:, None])
            law_GV = torch.log_softmax(total_GV, dim=-1)
            if plan.cutting:
                law_GV = truncate(law_GV, plan.top_k_G, plan.top_p_G, plan.min_p_G)
            token_G = draw(law_GV, plan.uniforms_GT[:, plan.steps])
            token_G1 = token_G[:, None]
            logp_G = law_GV.gather(1, token_G1)[:, 0]
            if any(plan.names):
                base_GV = normalised(seen[plan.base_G])
                base_G = base_GV.gather(1, token_G1)[:, 0]
                plan.sums_G3 += torch.stack([logp_G, base_G, kl_divergence(law_GV, base_GV)], dim=1)
            lawful_G = logp_G.isfinite()
            if not bool(lawful_G.all()):  # a model gave what is no number, and nothing may be drawn from it
                token_G = torch.where(lawful_G, token_G, plan.mark_G)
                logits[plan.rows_N[~lawful_G[plan.group_N]]] = 0
            logits[plan.rows_N, token_G[plan.group_N]] = torch.inf
            self._guides.append(token_G)
            plan.steps += 1
        if len(plan.lost):
            logits[plan.lost] = 0  # beside what is no number, +inf would not be the likeliest
            logits[plan.lost, plan.marks] = torch.inf
        return logits

    def _grouped(self) -> tuple[dict[str, list[int]], list[int]]:
        """The rows of groups that are whole and in step, the base's first; and the rows of all others."""
        groups: dict[str, list[int]] = {}
        for row, lane in self._rows.items():
            groups.setdefault(lane.group, []).append(row)
        whole: dict[str, list[int]] = {}
        lost: list[int] = []
        for name, rows in groups.items():
            rows.sort(key=lambda row: self._rows[row].lane)
            lanes = [self._rows[row] for row in rows]
            complete = [lane.lane for lane in lanes] == list(range(lanes[0].lanes))
            if complete and len({len(lane.output) for lane in lanes}) == 1:
                whole[name] = rows
            else:
                lost += rows
        order = self._guides.order({name: len(self._rows[rows[0]].output) for name, rows in whole.items()})
        return {name: whole[name] for name in order}, lost

    def _planned(self) -> _Plan:
        """What the batch is made of: each of its rows gets one token per step, until it changes."""
        whole, lost = self._grouped()
        rows_n = [row for rows in whole.values() for row in rows]
        sizes = [len(rows) for rows in whole.values()]
        told = [self._rows[rows[0]] for rows in whole.values()]
        self._guides.seat(
            [
                Guided(
                    lane.group,
                    lane.prompts,
                    {name: alpha / (lane.temperature or 1.0) for name, alpha in lane.guides.items()},
                    lane.output,
                )
                for lane in told
            ]
        )
        # A greedy row takes the likeliest token of the law at temperature 1, which is the likeliest at any.
        top_k = [lane.top_k if lane.temperature else 1 for lane in told]
        left = [torch.from_numpy(lane.uniforms[len(lane.output) :]) for lane in told]
        return _Plan(
            self._index(rows_n), self._index([place for place, size in enumerate(sizes) for _ in range(size)]),
            self._values([self._rows[row].alpha / (self._rows[row].temperature or 1.0) for row in rows_n]),
            self._index(list(accumulate(sizes, initial=0))[:-1]), self._index([rows[0] for rows in whole.values()]),
            [lane.group if lane.sums else None for lane in told],
            self._index(top_k), self._values([lane.top_p for lane in told]),
            self._values([lane.min_p for lane in told]),
            any(top_k) or any(lane.top_p < 1 or lane.min_p > 0 for lane in told),
            pad_sequence(left, batch_first=True).to(self._device) if left else torch.empty(0, 0),
            0, torch.zeros(len(whole), 3, dtype=torch.float64, device=self._device),
            self._index([lane.mark for lane in told]),
            self._index(lost), self._index([self._rows[row].mark for row in lost]),
        )  # fmt: skip

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)

    def _values(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def settle(self) -> None:
        """Move what was added up since the batch last changed: log π, log π_base and KL(π ‖ π_base), in nats."""
        if self._plan is None or not any(self._plan.names):
            return
        for name, found in zip(self._plan.names, self._plan.sums_G3.tolist(), strict=True):
            if name is not None:
                before = self.sums.setdefault(name, [0.0, 0.0, 0.0])
                self.sums[name] = [one + two for one, two in zip(before, found, strict=True)]
        self._plan.sums_G3 = torch.zeros(self._plan.sums_G3.shape, dtype=torch.float64, device=self._device)

    def taken(self, groups: set[str]) -> dict[str, list[float]]:
        """The sums of groups, which are forgotten."""
        self.settle()
        if self._plan is not None:
            self._plan.names = [None if name in groups else name for name in self._plan.names]
        return {group: self.sums.pop(group) for group in groups if group in self.sums}


class Ledger:
    """Methods that a worker gains (`worker_extension_cls`), for the frontend's `collective_rpc`."""

    def take_sums(self, groups: list[str]) -> dict[str, list[float]]:
        """log π, log π_base and KL of groups that have ended, which are forgotten here."""
        found: dict[str, list[float]] = {}
        for processor in self.model_runner.input_batch.logitsprocs.all:  # type: ignore[attr-defined]
            if isinstance(processor, LaneProcessor):
                found |= processor.taken(set(groups))
        return found


def facts(told: Any) -> dict[str, Any]:
    """What a lane says of itself: a mapping, or the same as JSON, which is what a server lets through."""
    found: dict[str, Any] = json.loads(told) if isinstance(told, str) else told
    return found


def _lane(told: Any, output: Sequence[int]) -> Lane:
    told = facts(told)
    lane, lanes, first, last = (int(told[name]) for name in ("lane", "lanes", "first", "last"))
    if not 0 <= lane < lanes or not 0 <= first < last:
        raise ValueError(f"lane {lane} of {lanes}, tokens {first} to {last}")
    # Only the base's lane draws, and speaks for the guides.
    uniforms = np.empty(0) if lane else random_stream(str(told["stream"]), last)[first:]
    return Lane(
        str(told["group"]), lane, lanes, float(told["alpha"]), int(told["mark"]), bool(told.get("sums", False)),
        float(told["temperature"]), int(told["top_k"]), float(told["top_p"]), float(told["min_p"]),
        told.get("prompts", ()), {name: float(alpha) for name, alpha in told.get("guides", {}).items()}, uniforms,
        output,
    )  # fmt: skip
