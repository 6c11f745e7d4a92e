"""The processor as each of vLLM's model runners calls it, without an engine: both have to draw the same tokens."""

from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from pipeline.decoding.request import Request
from pipeline.decoding.vllm.lanes import Shaping, lane_params
from pipeline.decoding.vllm.runner_v1 import LaneProcessorV1
from pipeline.decoding.vllm.runner_v2 import LaneProcessorV2, SlotTokens
from pipeline.decoding.vllm.settings import EXTRA

VOCABULARY, SLOTS, MARK, LONGEST = 12, 8, 11, 40


def config(**parallel):
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(enable_chunked_prefill=False, async_scheduling=False),
        parallel_config=SimpleNamespace(**{"enable_batch_sharded_sampling": False, **parallel}),
        additional_config={EXTRA: {"vocab_size": VOCABULARY, "guides": []}},
        speculative_config=None,
    )


class Lane:
    """A request of an engine."""

    def __init__(self, group, name, params, prompt):
        self.group, self.name, self.params, self.prompt, self.output = group, name, params, prompt, []
        self.computed = 0

    @property
    def known(self):
        return [*self.prompt, *self.output]


def lanes_of(group, seed, prompt, **shaping):
    """The lanes of a guided request with one ARM."""
    request = Request("Why?", {"arm": 0.7}, seed=seed, temperature=0.8, max_new_tokens=20)
    alphas = {"base": 1.0, "arm": 0.7}
    params = lane_params(
        group, request, alphas, Shaping(**shaping), mark=MARK, first=0, guides={}, prompts=[], sums=True,
        output=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    return [Lane(group, name, each, prompt) for name, each in zip(alphas, params, strict=True)]


def logits_of(lanes):
    """What the models would say: of the lane and its tokens alone."""
    rows = []
    for lane in lanes:
        seed = crc32(repr((lane.group, lane.name, lane.known[: lane.computed])).encode())
        rows.append(torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2)
    return torch.stack(rows)


class RunnerV1:
    """Keeps a batch, and tells what is in which row of it."""

    def __init__(self):
        self.processor, self.batch = LaneProcessorV1(config(), torch.device("cpu"), False), []

    def step(self, lanes):
        if lanes != self.batch:
            added = [(row, lane.params, lane.prompt, lane.output) for row, lane in enumerate(lanes)]
            removed = list(range(len(self.batch)))
            self.processor.update_state(BatchUpdate(len(lanes), removed=removed, added=added, moved=[]))
            self.batch = list(lanes)
        return self.processor.apply(logits_of(lanes)).argmax(1).tolist()


class RunnerV2:
    """Gives each request a slot, and tells which slot is in which row of a step."""

    def __init__(self):
        def numbers():
            return SimpleNamespace(np=np.zeros(SLOTS, np.int32))

        self.tokens = SimpleNamespace(gpu=torch.zeros(SLOTS, LONGEST, dtype=torch.int32))
        self.states = LogitsProcRequestState(
            torch.device("cpu"), SLOTS, VOCABULARY, self.tokens, numbers(), numbers(), numbers()
        )
        self.processor, self.slots = LaneProcessorV2(config(), self.states), {}

    def step(self, lanes):
        for lane in [lane for lane in self.slots if lane not in lanes]:
            del self.slots[lane]  # finished or preempted
        for lane in lanes:
            if lane not in self.slots:
                slot = self.slots[lane] = min(set(range(SLOTS)) - set(self.slots.values()))
                self.states.prompt_len.np[slot] = len(lane.prompt)
                self.states.prefill_len.np[slot] = len(lane.known)
                self.tokens.gpu[slot] = 0
                self.tokens.gpu[slot, : len(lane.known)] = torch.tensor(lane.known)
                assert self.processor.add_request(slot, lane.params) == ("guidance" in (lane.params.extra_args or {}))
            else:
                slot = self.slots[lane]
                self.tokens.gpu[slot, : len(lane.known)] = torch.tensor(lane.known)
        slots = np.array([self.slots[lane] for lane in lanes], np.int32)
        seen = np.array([lane.computed for lane in lanes], np.int32)
        rows = torch.from_numpy(slots)
        context = LogitsContext(rows, rows, slots, torch.zeros_like(rows), rows, rows, np.append(seen, 0))
        return self.processor.apply(logits_of(lanes), context).argmax(1).tolist()


KINDS = st.sampled_from(["draw", "draw", "draw", "enter", "piece", "shuffle", "preempt", "leave"])
EVENTS = st.lists(st.tuples(KINDS, st.integers(0, 99)), min_size=4, max_size=25)


@given(EVENTS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_both_runners_are_given_the_same_tokens_and_sums(events):
    """Through prompts in pieces, preemptions, other requests and any order of rows."""
    one, two = RunnerV1(), RunnerV2()
    running, out, count = [Lane("plain", "base", SamplingParams(), [3, 4])], [], 0
    for event, number in events:
        if event == "enter" and len(running) + len(out) <= SLOTS - 2:
            how = {"presence_penalty": 1.0} if number % 2 else {"min_tokens": 3, "stop_token_ids": (1, 2)}
            running += lanes_of(f"g{count}", number, [5, 6, 7][: 1 + number % 3], **how)
            count += 1
        if event == "shuffle":
            running = [running[place] for place in np.random.default_rng(number).permutation(len(running))]
        if event == "leave":
            gone = running[number % len(running)].group
            running = [lane for lane in running if lane.group != gone or gone == "plain"]
        if event == "preempt" and len(running) > 1:
            gone = running[number % len(running)].group  # as a whole: the scheduler sees to it
            out += [lane for lane in running if lane.group == gone and gone != "plain"]
            running = [lane for lane in running if lane not in out]
        else:
            running, out = running + out, []
        for lane in running:  # a piece: all of what is known but its last token, so that nothing drawn is kept
            lane.computed = len(lane.known) - (event == "piece" and lane not in one.batch)
        tokens = one.step(running)
        assert tokens == two.step(running)
        for lane, token in zip(running, tokens, strict=True):
            if lane.computed == len(lane.known):
                lane.output.append(token)
        for lane in running:
            if len(lane.known) > LONGEST - 2:
                return
        for name in {lane.group for lane in running} - {"plain"}:  # lanes of a group have drawn the same
            first, second = (lane.output for lane in running if lane.group == name)
            assert first == second
    names = {f"g{place}" for place in range(count)}
    found, expected = two.processor.taken(names), one.processor.taken(names)
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(expected[name]) for name in found)


def test_a_lane_alone_is_marked_even_where_its_logits_are_no_number():
    [lane, _] = lanes_of("x", 1, [5])
    for runner in (RunnerV1(), RunnerV2()):
        runner.step([lane])
        assert int(runner.processor._steer(torch.full((1, VOCABULARY), torch.nan)).argmax()) == MARK


def test_a_slot_belongs_to_its_last_request():
    runner = RunnerV2()
    lanes = lanes_of("x", 1, [5])
    runner.step(lanes)
    other = Lane("plain", "base", SamplingParams(), [3])
    other.computed = 1
    logits = logits_of([other])
    assert runner.step([other]) == logits.argmax(1).tolist()
    for lane, request in zip(lanes, (other, Lane("plain", "base", SamplingParams(), [4])), strict=True):
        slot = runner.slots.get(request, 7)  # a lane that left before its first step, and another request after it
        runner.processor.add_request(slot, lane.params)
        runner.processor.add_request(slot, request.params)
    assert runner.step([other]) == logits.argmax(1).tolist()


def test_tokens_of_a_slot_are_a_sequence_like_any_other():
    tokens = SimpleNamespace(gpu=torch.arange(20, dtype=torch.int32).reshape(2, 10))
    seen, expected = SlotTokens(tokens, 1, 2, 5), list(range(12, 17))
    assert list(seen) == [*seen] == expected and len(seen) == 5 and seen[-1] == 16 and seen[0] == 12
    for place in (slice(None), slice(2, 4), slice(5, None), slice(None, None, -1), slice(-2, None), slice(4, 1, -2)):
        assert seen[place] == expected[place]
    with pytest.raises(IndexError):
        seen[5]


@pytest.mark.parametrize("how", ["batch-sharded sampling", "speculative decoding"])
def test_a_runner_that_would_draw_rows_apart_does_not_start(how):
    chosen = config(enable_batch_sharded_sampling=how == "batch-sharded sampling")
    chosen.speculative_config = object() if how == "speculative decoding" else None
    states = RunnerV2().states
    with pytest.raises(ValueError, match=f"without {how}"):
        LaneProcessorV2(chosen, states)
