"""Lanes of a group draw together: named by `--scheduler-cls`.

Lanes need only agree on the step in which they draw. Their prompts may be computed in pieces, from a cache, and one
after the other: each lane stops before the last token of its prompt until all of its group are there, and then all go
on in one step. What falls out of step later, such as by a preemption, is the processor's affair.

A group also enters as a whole: under a load of other requests, which leave one by one, it would never get room for all
of its lanes otherwise.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from pipeline.decoding.vllm.lanes import facts_of

_PIECES = 8  # of a step's tokens: no prompt takes more of it, so that new requests find room beside long ones


class LaneRequest(Request):
    """A lane, which hides the last token of its prompt from the scheduler while it is held."""

    held = False

    @property
    def num_tokens(self) -> int:
        """Tokens to be computed now."""
        return len(self._all_token_ids) - self.held

    @property
    def num_tokens_with_spec(self) -> int:
        """The same, where nothing is drafted."""
        return self.num_tokens


class GroupScheduler(Scheduler):
    """The stock scheduler, which lets a group in as a whole, and its lanes draw in one step."""

    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arriving: dict[str, list[LaneRequest]] = {}
        self._held: dict[str, list[LaneRequest]] = {}  # whole groups, until they draw for the first time
        self._chunked = self.scheduler_config.enable_chunked_prefill
        if self._chunked and not self.scheduler_config.long_prefill_token_threshold:
            self.scheduler_config.long_prefill_token_threshold = max(1, self.max_num_scheduled_tokens // _PIECES)

    def add_request(self, request: Any) -> None:
        """Let a request in, or keep a lane until the others are here."""
        facts = facts_of(request.sampling_params)
        if facts is None:
            super().add_request(request)
            return
        request.__class__ = LaneRequest
        lanes = self._arriving.setdefault(facts["group"], [])
        lanes.append(request)
        if len(lanes) == facts["lanes"]:
            del self._arriving[facts["group"]]
            if len(lanes) > 1 and request.num_tokens > 1:
                self._held[facts["group"]] = lanes
            for lane in lanes:
                lane.held = facts["group"] in self._held
                super().add_request(lane)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Let groups go on whose lanes are all there, and no group in of which a part would stay outside."""
        for group, lanes in list(self._held.items()):
            if all(lane.num_computed_tokens >= lane.num_tokens for lane in lanes):
                self._release(group)
        # Whoever draws comes first, so that prompts never take the step's last tokens from a part of a group.
        self.running.sort(key=lambda request: request.num_tokens_with_spec - request.num_computed_tokens > 1)
        most, self.max_num_active_reqs = self.max_num_active_reqs, self._entering()
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_active_reqs = most
        if self._held and not output.total_num_scheduled_tokens:
            # Held lanes have taken all of the cache, and none can go on: the last group is lost, and begun again later.
            self._release(next(reversed(self._held)))
        return output

    def _entering(self) -> int:
        """How many requests may run in the next step."""
        most, entering = self.max_num_active_reqs, len(self.kv_holding_waiting)  # which come before all others
        tokens = self.max_num_scheduled_tokens - len(self.running)
        for _, lanes in groupby(self.waiting, key=_group):
            sizes = [lane.num_tokens for lane in lanes]
            tokens -= sum(sizes)
            inside = len(self.running) + entering
            # Without pieces, prompts have to fit into the step together.
            crowded = not self._chunked and entering and len(sizes) > 1 and tokens < 0
            if inside and (inside + len(sizes) > most or crowded):
                break
            entering += len(sizes)
        return min(most, len(self.running) + entering)

    def _release(self, group: str) -> None:
        for lane in self._held.pop(group, ()):
            lane.held = False

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: Any) -> list[Any]:
        """Forget lanes that are taken back before the others came, and let go of lanes whose group is not whole."""
        names = None if request_ids is None else {request_ids} if isinstance(request_ids, str) else set(request_ids)
        for group, lanes in list(self._arriving.items()):
            left = [] if names is None else [lane for lane in lanes if lane.request_id not in names]
            if left:
                self._arriving[group] = left
            else:
                del self._arriving[group]
        for group, lanes in list(self._held.items()):
            if names is None or any(lane.request_id in names for lane in lanes):
                self._release(group)
        finished: list[Any] = super().finish_requests(request_ids if names is None else names, finished_status)
        return finished


def _group(request: Any) -> str:
    """What a request enters together with: all lanes of its group, or itself alone."""
    facts = facts_of(request.sampling_params)
    return f"request {request.request_id}" if facts is None else f"group {facts['group']}"
