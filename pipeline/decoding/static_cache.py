"""The rows of a backbone in fixed shapes: every step writes and reads the same memory, so that it can be replayed.

`StaticSession` does what `kv_cache.BackboneSession` does. There rows lie lane by lane, aligned on the right, and
everything moves when rows come and go; here a row keeps its slot in each of its lanes, and a token's keys and values
lie at its position. Shapes: B rows, S slots (a lane of a row, or free), C columns of the cache, T tokens of a step, A
adapters, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from pipeline.decoding.backbone import Backbone
from pipeline.decoding.cuda_graphs import ReplayedStep, fused, fused_elementwise
from pipeline.decoding.kv_cache import BackboneSession, blocks_of
from pipeline.models.mixtures import shares_of

_FEW = 32  # slots that cost next to nothing beside the weights, which a step reads anyway
_AHEAD = 32  # columns that new rows find behind their prompts
_AT_ONCE = 32_768  # tokens of prompts that are read in one forward


class _SlotLayer(DynamicLayer):
    """One layer's keys and values: a step writes those of its tokens at their columns and reads all columns."""

    keys: Tensor
    values: Tensor
    column_ST: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the step's tokens of every slot (the interface of transformers)."""
        _write(self.keys, self.values, key_states, value_states, self.column_ST)
        return self.keys, self.values


@fused
def _write(keys_SHCE: Tensor, values_SHCE: Tensor, key_SHTE: Tensor, value_SHTE: Tensor, column_ST: Tensor) -> None:
    every_S1 = torch.arange(len(column_ST), device=column_ST.device)[:, None]
    keys_SHCE[every_S1, :, column_ST] = key_SHTE.transpose(1, 2)
    values_SHCE[every_S1, :, column_ST] = value_SHTE.transpose(1, 2)


class StaticSession:
    """Rows on their way through a backbone, with the methods of `BackboneSession`, in shapes that change seldom.

    Free slots are computed with the others and never looked at. Columns grow by a quarter or 64; slots are added when
    there are too few, and of many taken away when more than half are free. Only then is a step captured anew. Once all
    its rows have gone a small session waits for others, with its memory and its graph: `lanes_of`, `release`.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self._device = backbone, backbone.device
        self.rows: dict[str, Tensor] = {}  # per lane, the rows it serves, ascending
        self._places: dict[str, Tensor] = {}  # per lane, the slots of those rows
        self._slots: list[tuple[str, int] | None] = []  # whose each is: lane and row
        self._lengths: list[int] = []  # tokens that each slot has read
        self._layers: list[_SlotLayer] = []
        self._columns = 0
        # What a step reads and where it stays: its tokens, tokens read so far, how much of each adapter.
        self._length_S = self._index([])
        self._share_SA = torch.zeros(0, len(backbone.adapted.lanes), device=self._device)
        self._token_ST: dict[int, Tensor] = {}  # by T
        self._row_S = self._index([])
        self._adapted = False  # whether any slot has an adapter: else none is multiplied with
        self._waiting_S: Tensor | None = None  # the last prompt token of new rows, −1 at the others
        self._steps: dict[tuple[int, bool], ReplayedStep] = {}  # by T, with adapters and without
        self._logits_STV: Tensor | None = None

    def admit_rows(
        self, kept: Sequence[int], prompts: Sequence[Sequence[int]], newcomers: Sequence[tuple[int, Collection[str]]]
    ) -> None:
        """Let rows go and admit new ones behind those that stay; arguments as of `BackboneSession.admit_rows`."""
        number = {row: new for new, row in enumerate(kept)}
        self._slots = [(one[0], number[one[1]]) if one and one[1] in number else None for one in self._slots]
        new = [
            (lane, len(kept) + row, tuple(prompts[prompt]))
            for lane in self.backbone.own(set().union(*(lanes for _, lanes in newcomers)))
            for row, (prompt, lanes) in enumerate(newcomers)
            if lane in lanes
        ]
        self._make_room(len(new), max((len(prompt) for _, _, prompt in new), default=0))
        free = [slot for slot, one in enumerate(self._slots) if one is None][: len(new)]
        for slot, (lane, row, prompt) in zip(free, new, strict=True):
            self._slots[slot], self._lengths[slot] = (lane, row), len(prompt) - 1
        if new:
            self._read(free, [(lane, prompt) for lane, _, prompt in new])
        self._index_rows()

    def step(self, tokens_BT: Tensor) -> None:
        """Append each row's tokens in every lane that serves the row; the first of a new row is its prompt's last."""
        tokens_ST = tokens_BT.to(self._device)[self._row_S]
        if self._waiting_S is not None:
            tokens_ST[:, 0] = torch.where(self._waiting_S < 0, tokens_ST[:, 0], self._waiting_S)
            self._waiting_S = None
        count = tokens_ST.shape[1]
        # What is drafted may lie beyond the context, in columns of its own.
        longest, most = self._longest() + count, self.backbone.context + count - 1
        if longest > self._columns and self._columns < most:
            self._move(range(len(self._slots)), len(self._slots), _rounded_columns(longest, len(self._slots)))
        if count not in self._token_ST:
            self._token_ST[count] = torch.zeros_like(tokens_ST)
        self._token_ST[count].copy_(tokens_ST)
        self._lengths = [length + count for length in self._lengths]
        kind = count, self._adapted
        if kind not in self._steps:
            self._steps[kind] = ReplayedStep(partial(self._forward, self._token_ST[count]), self._device)
        self._logits_STV = self._steps[kind]()

    def rewind(self, counts_B: Tensor) -> None:
        """Take back the last tokens of each row, so many as `counts_B` says: the next step writes over them."""
        counts_S = counts_B.to(self._device)[self._row_S]
        self._lengths = [length - count for length, count in zip(self._lengths, counts_S.tolist(), strict=True)]
        self._length_S -= counts_S

    @property
    def small(self) -> bool:
        """Whether its memory is little beside the model's weights."""
        return len(self._slots) <= _FEW

    def logits(self, lane: str, place: int = -1) -> Tensor:
        """The lane's next-token logits behind a token of the last step, as of `BackboneSession.logits`: logits_bV."""
        assert self._logits_STV is not None
        return self._logits_STV[self._places[lane], place]

    def _forward(self, token_ST: Tensor) -> Tensor:
        """Keep each slot's tokens and return the logits behind them: logits_STV. Nothing here waits for the device."""
        adapted, count = self.backbone.adapted, token_ST.shape[1]
        # The slots of rows that have ended run on until they are taken: they stay at the last columns.
        first_S1 = self._length_S.clamp_max(self._columns - count)[:, None]
        column_ST = first_S1 + torch.arange(count, device=self._device)
        hidden_STC = torch.arange(self._columns, device=self._device) > column_ST[:, :, None]
        mask_STC = torch.zeros(hidden_STC.shape, dtype=adapted.model.dtype, device=self._device)
        mask_STC.masked_fill_(hidden_STC, torch.finfo(mask_STC.dtype).min)
        for layer in self._layers:
            layer.column_ST = column_ST
        adapted.serve_slots(self._share_SA if self._adapted else None)
        with fused_elementwise(adapted.model) if self._device.type == "cuda" else nullcontext():
            logits_STV: Tensor = adapted.model(
                input_ids=token_ST,
                attention_mask=mask_STC[:, None],
                position_ids=column_ST.clamp_max(self.backbone.context - 1),
                past_key_values=Cache(layers=list(self._layers)),
                use_cache=True,
            ).logits
        self._length_S += count
        return logits_STV

    def _longest(self) -> int:
        return max((length for length, one in zip(self._lengths, self._slots, strict=True) if one), default=0)

    def _make_room(self, newcomers: int, length: int) -> None:
        """Have enough free slots, and columns for prompts of that length."""
        taken, count = [slot for slot, one in enumerate(self._slots) if one], len(self._slots)
        needed, ahead = len(taken) + newcomers, max(length, self._longest()) + _AHEAD
        slots = _rounded_slots(needed) if needed > count or count > max(_FEW, 2 * needed) else count
        columns = _rounded_columns(ahead, slots)
        if slots < count:
            self._move(taken, slots, columns)
        elif slots > count or columns > self._columns or 2 * columns <= self._columns:
            self._move(range(count), slots, columns)

    def _move(self, taken: Sequence[int], slots: int, columns: int) -> None:
        """Lay the memory of these slots out anew, in this order and before free ones."""
        from_b, behind = self._index(taken), slots - len(taken)
        for place, layer in enumerate(self._layers):  # layer by layer: old and new are never held whole together
            keys, values = (_laid_out(held, from_b, slots, columns) for held in (layer.keys, layer.values))
            self._layers[place] = _SlotLayer(keys, values)
        self._slots = [*(self._slots[slot] for slot in taken), *[None] * behind]
        self._lengths = [*(self._lengths[slot] for slot in taken), *[0] * behind]
        self._length_S, self._share_SA = (
            torch.cat([held[from_b], held.new_zeros(behind, *held.shape[1:])])
            for held in (self._length_S, self._share_SA)
        )
        self._columns, self._steps, self._token_ST, self._logits_STV = columns, {}, {}, None

    def _read(self, slots: Sequence[int], prompts: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Read all but the last token of each new slot's prompt, once per lane and prompt."""
        places: dict[tuple[str, tuple[int, ...]], list[int]] = {}  # lane by lane, as they are asked
        for slot, one in zip(slots, prompts, strict=True):
            places.setdefault(one, []).append(slot)
        for piece in _pieces(list(places)):
            fresh, length = self._prompts(piece)
            from_b = self._index([number for number, one in enumerate(piece) for _ in places[one]])
            at_b = self._index([slot for one in piece for slot in places[one]])
            if not self._layers:
                none, shape = self._index([]), (len(self._slots), self._columns)
                self._layers = [_SlotLayer(*(_laid_out(held, none, *shape) for held in layer)) for layer in fresh]
            for layer in self._layers:
                keys, values = fresh.pop(0)
                layer.keys[at_b, :, :length], layer.values[at_b, :, :length] = keys[from_b], values[from_b]
        at_b, adapters = self._index(slots), self.backbone.adapted.lanes
        self._length_S[at_b] = self._index([len(prompt) - 1 for _, prompt in prompts])
        shares = [shares_of(lane, adapters) for lane, _ in prompts]
        share_bA = [[of.get(name, 0.0) for name in adapters] for of in shares]
        self._share_SA[at_b] = torch.tensor(share_bA, device=self._device)
        self._waiting_S = torch.full_like(self._length_S, -1)
        self._waiting_S[at_b] = self._index([prompt[-1] for _, prompt in prompts])

    def _prompts(self, prompts: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """Keys and values of prompts without their last tokens, per layer, and how many columns there are."""
        length = max(1, *(len(prompt) - 1 for _, prompt in prompts))  # one at least, which tells the shapes
        pad, cache = self.backbone.prompter.eos, Cache(layer_class_to_replicate=DynamicLayer)
        self.backbone.adapted.serve(blocks_of([lane for lane, _ in prompts]), step=False)
        # Padded on the right causal attention needs no mask: a prompt sees nothing of what lies behind it, and neither
        # do its next tokens, which are written over it.
        self.backbone.adapted.model.base_model(
            input_ids=self._index([[*prompt[:-1], *[pad] * (length + 1 - len(prompt))] for _, prompt in prompts]),
            position_ids=torch.arange(length, device=self._device)[None],
            past_key_values=cache,
            use_cache=True,
        )
        return [(layer.keys, layer.values) for layer in cast(list[Any], cache.layers)], length

    def _index_rows(self) -> None:
        self._row_S = self._index([one[1] if one else 0 for one in self._slots])
        lanes = {one[0] for one in self._slots if one}
        self._adapted = any(shares_of(lane, self.backbone.adapted.lanes) for lane in lanes)
        self.rows, self._places = {}, {}
        for lane in self.backbone.own(lanes):
            served = sorted((one[1], slot) for slot, one in enumerate(self._slots) if one and one[0] == lane)
            if served:
                self.rows[lane], self._places[lane] = (self._index(list(each)) for each in zip(*served, strict=True))

    def _index(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def _laid_out(held_SHCE: Tensor, from_b: Tensor, slots: int, columns: int) -> Tensor:
    """The memory of some slots at the beginning of a new one of so many slots and columns."""
    width = min(columns, held_SHCE.shape[2])
    new_SHCE = held_SHCE.new_zeros(slots, held_SHCE.shape[1], columns, held_SHCE.shape[3])
    new_SHCE[: len(from_b), :, :width] = held_SHCE[from_b, :, :width]
    return new_SHCE


def _rounded_slots(slots: int) -> int:
    return slots if slots <= 8 else -(-slots // 8) * 8


def _rounded_columns(columns: int, slots: int) -> int:
    """Up to the next multiple of 64, or of a quarter of the power of two below where that is more.

    Of 256 where slots are few: what they look back at is little beside the weights, and each change is a capture.
    """
    unit = max(64 if slots > 8 else 256, (1 << columns.bit_length() - 1) // 4)
    return -(-columns // unit) * unit


def _pieces(prompts: Sequence[tuple[str, tuple[int, ...]]]) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Neighbours that are read in one forward: its memory is bounded, padding included."""
    piece: list[tuple[str, tuple[int, ...]]] = []
    longest = 0
    for one in prompts:
        longest = max(longest, len(one[1]))
        if piece and longest * (len(piece) + 1) > _AT_ONCE:
            yield piece
            piece, longest = [], len(one[1])
        piece.append(one)
    yield piece


def lanes_of(backbone: Backbone) -> BackboneSession | StaticSession:
    """A session of rows on a backbone, in the shapes that suit it; perhaps one that has been released."""
    if not backbone.static:
        return BackboneSession(backbone)
    return backbone.idle.pop() if backbone.idle else StaticSession(backbone)


def release(lanes: BackboneSession | StaticSession) -> None:
    """Give a session back that no row is in any more: a small one is kept for the next, with memory and graph."""
    if isinstance(lanes, StaticSession) and lanes.small:
        lanes.backbone.idle[:] = [lanes]
