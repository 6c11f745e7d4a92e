"""The processor for vLLM's Model Runner V1, which tells what changes in its batch: rows added, removed and moved."""

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from pipeline.decoding.vllm.lanes import facts_of
from pipeline.decoding.vllm.processor import LaneProcessor
from pipeline.decoding.vllm.rows import lane_of


class LaneProcessorV1(LaneProcessor, LogitsProcessor):
    """Registered with an engine as `pipeline.decoding.vllm.runner_v1:LaneProcessorV1`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device)

    def is_argmax_invariant(self) -> bool:
        """No: it says which token is the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows of the batch."""
        if batch_update is None:
            return
        rows = dict(self._rows)
        for index in batch_update.removed:
            rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            rows.pop(index, None)
            if facts := facts_of(params):
                rows[index] = lane_of(facts, prompt or (), output, self._grammars)
        for one, two, direction in batch_update.moved:
            first, second = rows.pop(one, None), rows.pop(two, None)
            if first is not None:
                rows[two] = first
            if second is not None and direction == MoveDirectionality.SWAP:
                rows[one] = second
        self._follow(rows)

    def apply(self, logits: Tensor) -> Tensor:
        """Say which token each lane takes."""
        return self._steer(logits)
