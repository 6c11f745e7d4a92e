"""A model that reads rows of tokens, rewinds them, and looks ahead: keys and values lie at their token's position.

Shapes: S slots (a lane of a row), T time, C columns of the cache, A vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from pipeline.config.errors import UserError
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.guidance import cut, normalised
from pipeline.decoding.kv_cache import blocks_of
from pipeline.models.architecture import text_config

_ROOM = 64  # columns a cache grows by


@dataclass
class _Cursor:
    """Where the tokens of the next forward stand."""

    slots_S: Tensor | None = None  # None: all
    columns_ST: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    total: int = 0  # columns that are looked at
    keep: bool = True


class _Columns(DynamicLayer):
    """One layer's keys and values: what a cursor points at is written there, or into a copy that is thrown away."""

    rooms: tuple[Tensor, Tensor]

    def __init__(self, cursor: _Cursor) -> None:
        super().__init__()
        self.cursor = cursor

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put states where the cursor says, and return all of its slots (the interface of transformers)."""
        cursor, new = self.cursor, (key_states, value_states)
        if cursor.total > self.rooms[0].shape[2]:
            self.hold([_wider(room, cursor.total + _ROOM) for room in self.rooms])
        slots_S = torch.arange(len(key_states), device=key_states.device) if cursor.slots_S is None else cursor.slots_S
        updated = []
        for room, states in zip(self.rooms, new, strict=True):
            if cursor.keep:
                room[slots_S[:, None], :, cursor.columns_ST] = states.transpose(1, 2)
            held = room[:, :, : cursor.total]
            held = held if cursor.slots_S is None else held[slots_S]
            if not cursor.keep:
                each = torch.arange(len(held), device=held.device)
                held[each[:, None], :, cursor.columns_ST] = states.transpose(1, 2)
            updated.append(held)
        return updated[0], updated[1]

    def hold(self, rooms: Sequence[Tensor]) -> None:
        """Make these the buffers of keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(rooms[0], rooms[1])
        self.rooms = rooms[0], rooms[1]


def _wider(room: Tensor, columns: int) -> Tensor:
    wide = room.new_zeros(*room.shape[:2], columns, room.shape[3])
    wide[:, :, : room.shape[2]] = room
    return wide


class RewindableCache:
    """Rows on a backbone, every row in some of its lanes.

    Args:
        backbone: the model and its lanes.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.slots: list[tuple[str, int]] = []  # lane and row, lane by lane
        self._cursor = _Cursor()
        self._layers: list[_Columns] = []
        self._device = backbone.device
        config = text_config(backbone.adapted.model.config)
        self._window: int = getattr(config, "sliding_window", None) or 0
        plain = "sliding_attention" if self._window else "full_attention"
        self._kinds = sorted(set(getattr(config, "layer_types", None) or [plain]))

    def admit_rows(
        self, kept: Sequence[int], prompts: Sequence[Sequence[int]], newcomers: Sequence[tuple[int, Collection[str]]]
    ) -> None:
        """Let rows go, and admit new ones behind those that stay, with all of their prompt but its last token read.

        Args:
            kept: the rows that stay, ascending; they are numbered anew from 0.
            prompts: token ids, at least one each.
            newcomers: per new row, its place in `prompts` and the lanes that serve it.
        """
        number = {row: new for new, row in enumerate(kept)}
        lanes = self.backbone.own({lane for lane, _ in self.slots}.union(*(served for _, served in newcomers)))
        read = [
            (lane, prompt)
            for lane in lanes
            for prompt in range(len(prompts))
            if any(prompt == new_prompt and lane in served for new_prompt, served in newcomers)
        ]
        fresh = self._read([lane for lane, _ in read], [prompts[prompt][:-1] for _, prompt in read])
        behind = len(self.slots)  # what is read now is numbered behind what is there
        old = enumerate(self.slots)
        admitted = [(lanes.index(lane), number[row], place) for place, (lane, row) in old if row in number]
        admitted += [
            (lanes.index(lane), len(kept) + row, behind + place)
            for row, (new_prompt, served) in enumerate(newcomers)
            for place, (lane, prompt) in enumerate(read)
            if prompt == new_prompt and lane in served
        ]
        admitted.sort()
        from_S = torch.tensor([place for _, _, place in admitted], dtype=torch.long, device=self._device)
        self.slots = [(lanes[at], row) for at, row, _ in admitted]
        if fresh:
            self._layers = self._layers or [_Columns(self._cursor) for _ in fresh]
        for number_of_layer, layer in enumerate(self._layers if behind or fresh else ()):
            parts = [list(layer.rooms)] if behind else []
            parts += [fresh[number_of_layer]] if fresh else []
            columns = max(part[0].shape[2] for part in parts)
            layer.hold([torch.cat([_wider(part[kind], columns) for part in parts])[from_S] for kind in (0, 1)])

    def _read(self, lanes: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Keys and values of prompts read by lanes, per layer."""
        if not prompts:
            return []
        length = max(1, *map(len, prompts))  # where there is nothing to read, something is, and never looked at
        ids_ST = torch.tensor([[*one, *[0] * (length - len(one))] for one in prompts], device=self._device)
        mask_ST = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in prompts], device=self._device)
        mask_ST[:, 0] = 1
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        self.backbone.adapted.serve(blocks_of(lanes), step=False)
        self.backbone.adapted.model.base_model(
            input_ids=ids_ST,
            attention_mask=mask_ST,
            position_ids=torch.arange(length, device=self._device).expand(len(prompts), -1),
            past_key_values=cache,
            use_cache=True,
        )
        return [[layer.keys, layer.values] for layer in cast(list[Any], cache.layers)]

    def read(self, slots: Sequence[int] | None, starts: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read tokens from a position on, over whatever stood there: the next token's laws behind each, logps_STA.

        Args:
            slots: which, ascending; None: all.
            starts: per slot, the position of its first token.
            tokens: per slot, at least one; behind a slot's last the laws mean nothing.

        Raises:
            UserError: the context is full.
        """
        return self._forward(slots, starts, tokens, keep=True)

    def look(self, slots: Sequence[int], starts: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """As `read`, but nothing is kept, and a slot may come several times."""
        return self._forward(slots, starts, tokens, keep=False)

    @property
    def vocab_size(self) -> int:
        """A: the tokens that laws are over."""
        return self.backbone.vocab_size

    def _forward(
        self, slots: Sequence[int] | None, starts: Sequence[int], tokens: Sequence[Sequence[int]], keep: bool
    ) -> Tensor:  # fmt: skip
        length, device = max(map(len, tokens)), self._device
        total = max(starts) + length
        if max(start + len(one) for start, one in zip(starts, tokens, strict=True)) > self.backbone.context:
            raise UserError(
                f"a text has filled the context of {self.backbone.context} tokens of {', '.join(self.backbone.lanes)}: "
                "lower decoding.max_new_tokens."
            )
        lanes = [lane for lane, _ in self.slots] if slots is None else [self.slots[slot][0] for slot in slots]
        ids_ST = torch.tensor([[*one, *[0] * (length - len(one))] for one in tokens], device=device)
        cursor = self._cursor
        cursor.slots_S = None if slots is None else torch.tensor(slots, dtype=torch.long, device=device)
        cursor.columns_ST = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        cursor.total, cursor.keep = total, keep
        self.backbone.adapted.serve(blocks_of(lanes), step=True)
        logits_STA = self.backbone.adapted.model(
            input_ids=ids_ST,
            attention_mask=self._mask(cursor.columns_ST, total),
            position_ids=cursor.columns_ST.clamp_max(self.backbone.context - 1),
            past_key_values=Cache(layers=list(self._layers)),
            use_cache=True,
        ).logits
        return normalised(cut(logits_STA, self.vocab_size))

    def _mask(self, columns_ST: Tensor, total: int) -> Any:
        """What each token sees: what stands before it, and itself; in the form that models take as it is."""
        dtype, at_C = self.backbone.adapted.model.dtype, torch.arange(total, device=self._device)
        behind_STC = columns_ST[:, :, None] - at_C
        masks = {}
        for kind in self._kinds:
            seen = behind_STC >= 0
            if kind == "sliding_attention":
                seen &= behind_STC < self._window
            hidden = torch.zeros(seen.shape, dtype=dtype, device=self._device)
            masks[kind] = hidden.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))
