"""What runs inside vLLM: a batch-level logits processor that makes lanes of one group draw from the guided law.

A guided request is a group of *lanes*: the same prompt and seed, once for the base and once per ARM (a LoRA adapter of
the base). The processor replaces the logits of every lane of a group by Σ_i α_i x_i, the base's among them: what
normalises each lane's logits is one constant per row, which the softmax behind takes up, so this is the guided law
(`pipeline.guidance.guided_logps`; vLLM divides by the temperature and cuts top-k and top-p afterwards). Lanes share
seed and distribution, so they draw the same token and stay in step.

A lane can be missing all the same (scheduled later, preempted, aborted). Those present then must not draw from what is
no guided law: they are given the *mark*, a token that ends them at once and that tells the frontend to go on from the
last good token. Nothing but tokens passes between processor and frontend, so they may be on different machines.

Shapes: N rows of whole groups, G groups, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from pipeline.guidance import kl_divergence, normalised, truncate

EXTRA = "guidance"  # the key of a lane's facts in `SamplingParams.extra_args`


@dataclass(frozen=True)
class Lane:
    """One lane's row of the batch."""

    group: str
    lane: int  # 0 is the base
    lanes: int  # of the group
    alpha: float
    mark: int
    sums: bool
    cut: tuple[float, int, float, float]  # temperature, top-k, top-p, min-p
    output: Sequence[int]  # vLLM's own list: it grows as tokens are drawn


@dataclass
class _Plan:
    """The index tensors of a batch, until it changes."""

    rows_N: Tensor
    group_N: Tensor
    alpha_N1: Tensor
    groups: int
    lost: Tensor  # rows whose group is not whole
    marks: Tensor
    summed: list[Lane]  # the base lanes of groups whose sums are kept
    summed_G: Tensor
    cuts: tuple[Tensor, ...]
    base_rows: Tensor


class LaneProcessor(LogitsProcessor):
    """Registered with an engine as `pipeline.engines.vllm_processor:LaneProcessor`.

    Raises:
        ValueError: the engine is configured so that lanes could fall out of step unseen.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        scheduler = vllm_config.scheduler_config
        if scheduler.enable_chunked_prefill:
            raise ValueError("guided lanes need whole prompts: start vLLM with --no-enable-chunked-prefill.")
        if scheduler.async_scheduling:
            raise ValueError(
                "guided lanes need every token before the next step: start vLLM with --no-async-scheduling."
            )
        self._device = device
        self._rows: dict[int, Lane] = {}
        self._plan: _Plan | None = None
        self._pending: tuple[list[Lane], list[int], Tensor, Tensor] | None = None
        self.sums: dict[str, list[float]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse lanes that are not spelled as the frontend spells them.

        Raises:
            ValueError: a fact is missing or of the wrong type, or the lane has no seed.
        """
        told = (sampling_params.extra_args or {}).get(EXTRA)
        if told is None:
            return
        try:
            _lane(told, sampling_params, ())
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"extra_args[{EXTRA!r}] is no lane of a guided request: {error!r}") from error
        if sampling_params.seed is None and sampling_params.temperature > 0:
            raise ValueError("a guided lane needs the seed of its group.")

    def is_argmax_invariant(self) -> bool:
        """No: greedy decoding takes the likeliest token of the guided law."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows of the batch."""
        if batch_update is None:
            return
        self._settle()
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, output in batch_update.added:
            self._rows.pop(index, None)
            if told := (params.extra_args or {}).get(EXTRA):
                self._rows[index] = _lane(told, params, output)
        for one, two, direction in batch_update.moved:
            first, second = self._rows.pop(one, None), self._rows.pop(two, None)
            if first is not None:
                self._rows[two] = first
            if second is not None and direction == MoveDirectionality.SWAP:
                self._rows[one] = second
        self._plan = self._planned() if self._rows else None

    def apply(self, logits: Tensor) -> Tensor:
        """Put the guided sum into every lane of a whole group, and the mark where one is missing: logits_BV."""
        plan = self._plan
        if plan is None:
            return logits
        self._settle()
        if plan.groups:
            lanes_NV = logits[plan.rows_N]
            base_GV = logits[plan.base_rows] if plan.summed else None
            total_GV = torch.zeros(plan.groups, logits.shape[-1], dtype=logits.dtype, device=logits.device)
            total_GV.index_add_(0, plan.group_N, lanes_NV.mul_(plan.alpha_N1))
            logits[plan.rows_N] = total_GV[plan.group_N]
            if base_GV is not None:
                self._remember(plan, total_GV, base_GV)
        if len(plan.lost):
            logits[plan.lost] = -torch.inf
            logits[plan.lost, plan.marks] = 0.0
        return logits

    def _planned(self) -> _Plan:
        """Which groups are whole and in step; an engine schedules a row or takes it from the batch, so this holds."""
        groups: dict[str, list[int]] = {}
        for row, lane in self._rows.items():
            groups.setdefault(lane.group, []).append(row)
        rows, group, alphas, lost, summed, bases = [], [], [], [], [], []
        count = 0
        for members in groups.values():
            lanes = [self._rows[row] for row in members]
            whole = {lane.lane for lane in lanes} == set(range(lanes[0].lanes)) and len(lanes) == lanes[0].lanes
            if not whole or len({len(lane.output) for lane in lanes}) > 1:
                lost += members
                continue
            rows += members
            group += [count] * len(members)
            alphas += [lane.alpha for lane in lanes]
            base = min(members, key=lambda row: self._rows[row].lane)
            if self._rows[base].sums:
                summed.append((count, base))
            count += 1
        bases = [row for _, row in summed]
        told = [self._rows[row] for row in bases]
        temperature, top_k, top_p, min_p = zip(*(lane.cut for lane in told), strict=True) if told else ((),) * 4
        return _Plan(
            self._index(rows), self._index(group), self._values(alphas)[:, None], count, self._index(lost),
            self._index([self._rows[row].mark for row in lost]), told, self._index([place for place, _ in summed]),
            (self._values(temperature), self._index(top_k), self._values(top_p), self._values(min_p)),
            self._index(bases),
        )  # fmt: skip

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=self._device)

    def _values(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=self._device)

    def _remember(self, plan: _Plan, total_GV: Tensor, base_GV: Tensor) -> None:
        """Keep the laws of this step until their tokens are drawn."""
        temperature_G, top_k_G, top_p_G, min_p_G = plan.cuts
        law_GV = normalised(total_GV[plan.summed_G] / temperature_G.masked_fill(temperature_G == 0, 1.0)[:, None])
        if bool(((top_k_G > 0) | (top_p_G < 1) | (min_p_G > 0)).any()):
            law_GV = truncate(law_GV, top_k_G, top_p_G, min_p_G)
        self._pending = plan.summed, [len(lane.output) for lane in plan.summed], law_GV, normalised(base_GV)

    def _settle(self) -> None:
        """Add up what the step before drew: log π, log π_base and KL(π ‖ π_base) of each group, in nats."""
        if self._pending is None:
            return
        lanes, places, law_GV, base_GV = self._pending
        self._pending = None
        drawn = [
            lane.output[place] if len(lane.output) > place else -1 for lane, place in zip(lanes, places, strict=True)
        ]
        token_G1 = self._index([max(0, token) for token in drawn])[:, None]
        logp_G, base_G = law_GV.gather(1, token_G1)[:, 0], base_GV.gather(1, token_G1)[:, 0]
        # A greedy law is one token; of equally likely ones vLLM's own choice, whatever another top-1 would say.
        greedy_G = torch.tensor([lane.cut[0] == 0 for lane in lanes], device=logp_G.device)
        kl_G = torch.where(greedy_G, -base_G, kl_divergence(law_GV, base_GV))
        steps_G3 = torch.stack([logp_G.masked_fill(greedy_G, 0.0), base_G, kl_G], dim=1)
        for lane, token, step in zip(lanes, drawn, steps_G3.double().tolist(), strict=True):
            if token >= 0:
                before = self.sums.setdefault(lane.group, [0.0, 0.0, 0.0])
                self.sums[lane.group] = [one + two for one, two in zip(before, step, strict=True)]


class Ledger:
    """Methods that a worker gains (`worker_extension_cls`), for the frontend's `collective_rpc`."""

    def take_sums(self, groups: list[str]) -> dict[str, list[float]]:
        """log π, log π_base and KL of groups that have ended, which are forgotten here."""
        found: dict[str, list[float]] = {}
        for processor in self.model_runner.input_batch.logitsprocs.all:  # type: ignore[attr-defined]
            if isinstance(processor, LaneProcessor):
                processor._settle()
                found |= {group: processor.sums.pop(group) for group in groups if group in processor.sums}
        return found


def _lane(told: Any, params: Any, output: Sequence[int]) -> Lane:
    cut = float(params.temperature), max(0, int(params.top_k)), float(params.top_p), float(params.min_p)
    lane, lanes = int(told["lane"]), int(told["lanes"])
    if not 0 <= lane < lanes:
        raise ValueError(f"lane {lane} of {lanes}")
    return Lane(
        str(told["group"]),
        lane,
        lanes,
        float(told["alpha"]),
        int(told["mark"]),
        bool(told.get("sums", False)),
        cut,
        output,
    )
