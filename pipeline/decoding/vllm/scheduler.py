"""Lanes of a group enter vLLM together: named by `--scheduler-cls` where several processes hand them over one by one.

A lane that arrived alone would be scheduled alone, marked, and begun again. So would a group for which there is room in
part: under a load of other requests, which leave one by one, it would never get in. What falls out of step later is the
processor's affair.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from pipeline.decoding.vllm.processor import facts
from pipeline.decoding.vllm.settings import EXTRA


class GroupScheduler(Scheduler):
    """The stock scheduler, which lets a group in as a whole."""

    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arriving: dict[str, list[Any]] = {}

    def add_request(self, request: Any) -> None:
        """Let a request in, or hold a lane until the others are here."""
        told = _told(request)
        if told is None:
            super().add_request(request)
            return
        lanes = self._arriving.setdefault(told["group"], [])
        lanes.append(request)
        if len(lanes) == int(told["lanes"]):
            for lane in self._arriving.pop(told["group"]):
                super().add_request(lane)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Let no group in of which a part would stay outside: for want of slots, or behind prompts of others."""
        most, entering = self.max_num_active_reqs, len(self.kv_holding_waiting)  # which come before all others
        tokens = self.max_num_scheduled_tokens - len(self.running)
        for _, lanes in groupby(self.waiting, key=_group):
            sizes = [lane.num_tokens for lane in lanes]
            tokens -= sum(sizes)
            inside = len(self.running) + entering
            if inside and (inside + len(sizes) > most or (entering and len(sizes) > 1 and tokens < 0)):
                break
            entering += len(sizes)
        self.max_num_active_reqs = min(most, len(self.running) + entering)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.max_num_active_reqs = most

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: Any) -> list[Any]:
        """Forget lanes that are taken back before the others came."""
        names = None if request_ids is None else {request_ids} if isinstance(request_ids, str) else set(request_ids)
        for group, lanes in list(self._arriving.items()):
            left = [] if names is None else [lane for lane in lanes if lane.request_id not in names]
            if left:
                self._arriving[group] = left
            else:
                del self._arriving[group]
        found: list[Any] = super().finish_requests(request_ids if names is None else names, finished_status)
        return found


def _told(request: Any) -> dict[str, Any] | None:
    """What a lane says of itself; None of any other request."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    return facts(extra[EXTRA]) if EXTRA in extra else None


def _group(request: Any) -> str:
    """What a request enters together with: all lanes of its group, or itself alone."""
    told = _told(request)
    return f"request {request.request_id}" if told is None else f"group {told['group']}"
