"""The processor for vLLM's Model Runner V2, which gives each request a slot for life, and tells the rows of each step.

Which token a lane takes is known where it was drawn, on the device; how many it has taken is known on the host. So
lists of tokens are fetched only where somebody reads them: grammars, penalties, and guides that read a group anew.
"""

from collections.abc import Iterator, Sequence
from typing import Any, overload

from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from pipeline.decoding.vllm.lanes import facts_of
from pipeline.decoding.vllm.processor import LaneProcessor
from pipeline.decoding.vllm.rows import Lane, lane_of


class SlotTokens(Sequence[int]):
    """Tokens of the request in a slot, read from vLLM's own buffer when they are asked for.

    Args:
        tokens: of all slots.
        slot: of the request.
        first: where these tokens begin.
        length: how many there are; a response's grows.
    """

    def __init__(self, tokens: Any, slot: int, first: int, length: int) -> None:
        self._tokens, self._slot, self._first, self.length = tokens, slot, first, length

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        """A token, or a list of them."""
        if isinstance(place, slice) and not range(self.length)[place]:
            return []  # and waits for no device
        tokens: list[int] = self._tokens.gpu[self._slot, self._first : self._first + self.length].tolist()
        return tokens[place]

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])


class LaneProcessorV2(LaneProcessor, LogitsProcessor):
    """Registered with an engine as `pipeline.decoding.vllm.runner_v2:LaneProcessorV2`.

    Raises:
        ValueError: rows of a group could be drawn apart, by several devices or as drafts.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        if vllm_config.parallel_config.enable_batch_sharded_sampling:
            raise ValueError("lanes of a group are drawn on one device: start vLLM without batch-sharded sampling.")
        if vllm_config.speculative_config is not None:
            raise ValueError("guided lanes draw one token a step: start vLLM without speculative decoding.")
        super().__init__(vllm_config, req_states.device)
        self._states = req_states
        self._facts: dict[int, dict[str, Any]] = {}  # of lanes whose tokens cannot be read yet, by slot
        self._lanes: dict[int, tuple[Lane, SlotTokens]] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take note of a lane; whether it is one."""
        self._lanes.pop(req_idx, None)
        self._facts.pop(req_idx, None)
        if facts := facts_of(sampling_params):
            self._facts[req_idx] = facts
        return req_idx in self._facts

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Say which token each lane takes."""
        rows: dict[int, Lane] = {}
        keeping = []
        for row, (slot, seen) in enumerate(zip(ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np, strict=False)):
            held = self._lane(int(slot))
            if held is None:
                continue
            rows[row], output = held
            known = int(self._states.prefill_len.np[slot])
            output.length = max(int(seen), known) - int(self._states.prompt_len.np[slot])
            if seen >= known:  # of a prompt's piece vLLM keeps no token
                keeping.append(output)
        if list(rows.items()) != list(self._rows.items()):
            self._follow(rows)
        logits = self._steer(logits)
        for output in keeping:
            output.length += 1
        return logits

    def _lane(self, slot: int) -> tuple[Lane, SlotTokens] | None:
        """The lane in a slot and its response; None where another request is."""
        if slot in self._facts:
            tokens, prompt = self._states.all_token_ids, int(self._states.prompt_len.np[slot])
            output = SlotTokens(tokens, slot, prompt, 0)
            lane = lane_of(self._facts.pop(slot), SlotTokens(tokens, slot, 0, prompt), output, self._grammars)
            self._lanes[slot] = lane, output
        return self._lanes.get(slot)
