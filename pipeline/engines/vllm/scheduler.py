"""Lanes of a group enter vLLM together: named by `--scheduler-cls` where several processes hand them over one by one.

A lane that arrived alone would be scheduled alone, marked, and begun again. What the stock scheduler does with lanes
that are there is left as it is; what falls out of step later is the processor's affair.
"""

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from pipeline.engines.vllm.processor import facts
from pipeline.engines.vllm.settings import EXTRA


class GroupScheduler(Scheduler):
    """The stock scheduler, which sees a group only once all of its lanes have arrived."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arriving: dict[str, list[Any]] = {}

    def add_request(self, request: Any) -> None:
        """Let a request in, or hold a lane until the others are here."""
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        if EXTRA not in extra:
            super().add_request(request)
            return
        told = facts(extra[EXTRA])
        lanes = self._arriving.setdefault(told["group"], [])
        lanes.append(request)
        if len(lanes) == int(told["lanes"]):
            for lane in self._arriving.pop(told["group"]):
                super().add_request(lane)

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
