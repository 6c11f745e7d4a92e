"""What runs inside vLLM: a batch-level logits processor that makes lanes of one group draw from the guided law.

vLLM has two model runners, each with an interface of its own for logits processors: `runner_v1` and `runner_v2` say
which lane is in which row of the batch, and all else is here.

A guided request is a group of *lanes*: the same prompt, once for the base and once per ARM (a LoRA adapter of the
base). The processor sums their logits, Σ_i α_i x_i / T: what normalises each lane is one constant per row, which the
softmax behind takes up, so this is the guided law (`pipeline.decoding.guidance.guided_logps`). It cuts and draws as
`GuidedDecoder` does, from the row's own random stream, and gives all lanes the token that was drawn; to vLLM they are
greedy. So the lanes stay in step, vLLM samples nothing twice, and in float32 a text is the one that `GuidedDecoder`
writes.

ARMs that are no adapters of the base have no lane here, but a row in `guides`, which adds to the same sum.

A lane can be missing all the same (scheduled later, preempted, aborted). Those present then must not go on with what is
no guided law: they are given the *mark*, a token that ends them at once and that tells the frontend to go on from the
last good token. Tokens pass between processor and frontend as vLLM's own; sums and log-probabilities are fetched by
vLLM's `collective_rpc`. So they may be on different machines.

vLLM also runs processors while a prompt is computed in pieces, and throws away what is drawn then. A lane's list of
tokens does not grow by such a draw, which is how it is noticed here: nothing of it is kept.

Shapes: B rows of the batch, N of them in whole groups, G groups, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm.config import VllmConfig

from pipeline.decoding.guidance import cut, draw, kl_divergence, normalised, truncate
from pipeline.decoding.vllm.grammar import Grammars
from pipeline.decoding.vllm.guides import Guided, Guides
from pipeline.decoding.vllm.lanes import check_seal, facts_of
from pipeline.decoding.vllm.logprobs import TokenLogprobs, token_logprobs
from pipeline.decoding.vllm.rows import Lane, Plan
from pipeline.decoding.vllm.settings import EXTRA, SCHEDULER

_KEPT = 4096  # groups whose log-probabilities are kept until they are fetched


class LaneProcessor:
    """The lanes of a batch, by the row in which each is; the part of a processor that both model runners share.

    Args:
        vllm_config: vLLM's.
        device: where logits are.

    Raises:
        ValueError: the engine is configured so that lanes could fall out of step unseen.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        scheduler = vllm_config.scheduler_config
        if scheduler.enable_chunked_prefill and scheduler.scheduler_cls != SCHEDULER:
            raise ValueError(f"lanes whose prompts are computed in pieces need vLLM's --scheduler-cls {SCHEDULER}.")
        if scheduler.async_scheduling:
            raise ValueError("guided lanes need each token in time: start vLLM with --no-async-scheduling.")
        config = vllm_config.additional_config[EXTRA]
        self._device = device
        self._guides = Guides(config["guides"], device)
        self._vocab_size = min([int(config["vocab_size"]), *self._guides.vocab_sizes])
        self._grammars = Grammars(vllm_config)
        self._rows: dict[int, Lane] = {}
        self._plan: Plan | None = None
        self._changed = False
        self.sums: dict[str, list[float]] = {}
        self.records: dict[str, dict[int, TokenLogprobs]] = {}  # per group, by position in the response

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse lanes that this process did not write, and so every number that was not checked.

        Raises:
            ValueError: the seal is missing.
        """
        facts = facts_of(sampling_params)
        if facts is not None:
            check_seal(facts)

    def _follow(self, rows: dict[int, Lane]) -> None:
        """Take note of where lanes are now."""
        self.settle()
        self._rows, self._plan, self._changed = rows, None, True

    def _steer(self, logits: Tensor) -> Tensor:
        """Make the drawn token the likeliest of every lane of a whole group, and the mark where one is missing."""
        if not self._changed and not self._keep_last_step():
            self.settle()
            self._changed = True
        if self._changed:
            self._plan, self._changed = self._planned(), False
        plan = self._plan
        if plan is None:
            return logits
        if plan.names:
            self._draw(plan, logits)
        if len(plan.lost):
            logits[plan.lost] = 0  # beside what is no number, +inf would not be the likeliest
            logits[plan.lost, plan.marks] = torch.inf
        return logits

    def _draw(self, plan: Plan, logits: Tensor) -> None:
        """Draw a token for each whole group, and make it the likeliest of its lanes."""
        seen = cut(logits, self._vocab_size)
        # No row adds to another group, not even 0 times what it has: another request's may be −inf (a grammar, a
        # shortest length), or an overflow, and 0 · −inf is no number.
        total_GV = F.embedding_bag(plan.rows_N, seen, plan.starts_G, mode="sum", per_sample_weights=plan.alpha_N)
        beside = []
        for name, rows_g, alpha_g, values_gV in self._guides.read():
            total_GV.index_add_(0, rows_g, cut(values_gV, self._vocab_size).to(total_GV) * alpha_g[:, None])
            beside.append((name, rows_g.tolist(), cut(values_gV, self._vocab_size)))
        self._shape(plan, total_GV)
        whole_GV = law_GV = torch.log_softmax(total_GV, dim=-1)
        if plan.cutting:
            law_GV = truncate(law_GV, plan.top_k_G, plan.top_p_G, plan.min_p_G)
        token_G = draw(law_GV, plan.uniforms_GT[:, plan.steps])
        logp_G = law_GV.gather(1, token_G[:, None])[:, 0]
        if any(plan.names):
            base_GV = normalised(seen[plan.base_G])
            base_G = base_GV.gather(1, token_G[:, None])[:, 0]
            plan.last_G3 = torch.stack([logp_G, base_G, kl_divergence(law_GV, base_GV)], dim=1)
        lawful_G = logp_G.isfinite()
        if not bool(lawful_G.all()):  # a model gave what is no number, and nothing may be drawn from it
            token_G = torch.where(lawful_G, token_G, plan.mark_G)
            logits[plan.rows_N[~lawful_G[plan.group_N]]] = 0
        plan.records = self._recorded(plan, whole_GV, token_G, seen, beside)
        for place, counts_V in plan.counts.items():
            counts_V[token_G[place]] += 1
        logits[plan.rows_N, token_G[plan.group_N]] = torch.inf
        self._guides.append(token_G)
        plan.steps += 1

    def _shape(self, plan: Plan, total_GV: Tensor) -> None:
        """Take penalties off the sums of groups, and take out early ends and what a grammar forbids."""
        for place, counts_V in plan.counts.items():
            lane = plan.lanes[place]
            penalty_V = lane.frequency_penalty * counts_V + lane.presence_penalty * (counts_V > 0)
            total_GV[place] -= penalty_V / (lane.temperature or 1.0)
        for place, lane in enumerate(plan.lanes):
            if lane.min_tokens and len(lane.before) + plan.lengths[place] + plan.steps < lane.min_tokens:
                total_GV[place, [token for token in lane.stop_token_ids if token < self._vocab_size]] = -torch.inf
        matchers = {
            place: (lane.matcher, lane.drawn) for place, lane in enumerate(plan.lanes) if lane.matcher is not None
        }
        self._grammars.mask(matchers, total_GV)

    def _recorded(
        self, plan: Plan, law_GV: Tensor, token_G: Tensor, seen: Tensor, beside: Sequence[tuple[str, list[int], Tensor]]
    ) -> dict[str, TokenLogprobs]:  # fmt: skip
        """Log-probabilities of the step, of groups that want them."""
        records = {}
        for place, lane in enumerate(plan.lanes):
            if lane.top_logprobs is None:
                continue
            rows = plan.rows_N[plan.group_N == place].tolist()
            models = {self._rows[row].model: seen[row] for row in rows}
            models |= {name: values_gV[rows_g.index(place)] for name, rows_g, values_gV in beside if place in rows_g}
            records[lane.group] = token_logprobs(law_GV[place], int(token_G[place]), lane.top_logprobs, models)
        return records

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

    def _planned(self) -> Plan:
        """What the batch is made of: each of its rows gets one token per step, until it changes."""
        whole, lost = self._grouped()
        rows_n = [row for rows in whole.values() for row in rows]
        sizes = [len(rows) for rows in whole.values()]
        lanes = [self._rows[rows[0]] for rows in whole.values()]
        self._guides.admit_rows(
            [
                Guided(
                    lane.group,
                    lane.prompts,
                    {name: alpha / (lane.temperature or 1.0) for name, alpha in lane.guides.items()},
                    lane.output,
                )
                for lane in lanes
            ]
        )
        # A greedy row takes the likeliest token of the law at temperature 1, which is the likeliest at any.
        top_k = [lane.top_k if lane.temperature else 1 for lane in lanes]
        left = [torch.from_numpy(lane.uniforms[len(lane.output) :]) for lane in lanes]
        return Plan(
            self._index(rows_n), self._index([place for place, size in enumerate(sizes) for _ in range(size)]),
            self._values([self._rows[row].alpha / (self._rows[row].temperature or 1.0) for row in rows_n]),
            self._index(list(accumulate(sizes, initial=0))[:-1]), self._index([rows[0] for rows in whole.values()]),
            [lane.group if lane.sums else None for lane in lanes],
            self._index(top_k), self._values([lane.top_p for lane in lanes]),
            self._values([lane.min_p for lane in lanes]),
            any(top_k) or any(lane.top_p < 1 or lane.min_p > 0 for lane in lanes),
            pad_sequence(left, batch_first=True).to(self._device) if left else torch.empty(0, 0),
            lanes, [len(lane.output) for lane in lanes],
            {
                place: torch.bincount(self._index(list(lane.drawn)), minlength=self._vocab_size)[: self._vocab_size]
                for place, lane in enumerate(lanes)
                if lane.presence_penalty or lane.frequency_penalty
            },
            torch.zeros(len(whole), 3, dtype=torch.float64, device=self._device),
            self._index([lane.mark for lane in lanes]),
            self._index(lost), self._index([self._rows[row].mark for row in lost]),
        )  # fmt: skip

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)

    def _values(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def _keep_last_step(self) -> bool:
        """Keep what the last step adds to sums and log-probabilities, where vLLM kept its token; whether it all did."""
        plan = self._plan
        if plan is None or not plan.steps:
            return True
        kept = [len(lane.output) == length + plan.steps for lane, length in zip(plan.lanes, plan.lengths, strict=True)]
        if plan.last_G3 is not None:
            if not all(kept):
                plan.last_G3 = torch.where(torch.tensor(kept, device=self._device)[:, None], plan.last_G3, 0.0)
            plan.sums_G3 = plan.sums_G3 + plan.last_G3  # not in place: some callers are outside inference mode
        for lane, is_kept in zip(plan.lanes, kept, strict=True):
            if is_kept and lane.group in plan.records:
                position = len(lane.before) + len(lane.output) - 1
                self.records.setdefault(lane.group, {})[position] = plan.records[lane.group]
        while len(self.records) > _KEPT:  # of clients that left in the middle of fetching them
            del self.records[next(iter(self.records))]
        plan.last_G3, plan.records = None, {}
        return all(kept)

    def settle(self) -> None:
        """Move what was added up since the batch last changed: log π, log π_base and KL(π ‖ π_base), in nats."""
        self._keep_last_step()
        if self._plan is None or not any(self._plan.names):
            return
        for name, added in zip(self._plan.names, self._plan.sums_G3.tolist(), strict=True):
            if name is not None:
                before = self.sums.setdefault(name, [0.0, 0.0, 0.0])
                self.sums[name] = [one + two for one, two in zip(before, added, strict=True)]
        self._plan.sums_G3 = torch.zeros(self._plan.sums_G3.shape, dtype=torch.float64, device=self._device)

    def taken(self, groups: set[str]) -> dict[str, list[float]]:
        """The sums of groups, which are forgotten."""
        self.settle()
        if self._plan is not None:
            self._plan.names = [None if name in groups else name for name in self._plan.names]
        return {group: self.sums.pop(group) for group in groups if group in self.sums}


class Ledger:
    """Methods that a worker gains (`worker_extension_cls`), for the frontend's `collective_rpc`."""

    def _lane_processors(self) -> Iterator[LaneProcessor]:
        runner = self.model_runner  # type: ignore[attr-defined]
        v2 = self.use_v2_model_runner  # type: ignore[attr-defined]
        loaded = runner.sampler.logits_processors if v2 else runner.input_batch.logitsprocs.all
        yield from (processor for processor in loaded if isinstance(processor, LaneProcessor))

    def take_sums(self, groups: list[str]) -> dict[str, list[float]]:
        """log π, log π_base and KL of groups that have ended, which are forgotten here."""
        sums: dict[str, list[float]] = {}
        for processor in self._lane_processors():
            sums |= processor.taken(set(groups))
        return sums

    def take_logprobs(self, group: str) -> dict[int, TokenLogprobs]:
        """Log-probabilities of a group's tokens since they were last fetched, by position; forgotten here."""
        logprobs: dict[int, TokenLogprobs] = {}
        for processor in self._lane_processors():
            processor.settle()
            logprobs |= processor.records.pop(group, {})
        return logprobs
