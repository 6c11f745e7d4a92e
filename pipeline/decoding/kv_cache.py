"""One causal LM as the decoder sees it: its lanes, their key-value cache, and their next-token logits.

A lane is one model: the backbone itself, or the backbone with a LoRA adapter or a mixture of some. The rows of all
lanes go through the backbone together, so its weights are read once per step. Shapes: B rows, L block rows over all
lanes, T time (padded on the left), C columns of the cache, V vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicLayer

from pipeline.decoding.backbone import Backbone
from pipeline.decoding.fused_lora import Block
from pipeline.models.prompting import left_pad

_ROOM = 64  # columns a cache grows by, so that appending a token copies nothing


class _RoomyLayer(DynamicLayer):
    """Keys and values as views of buffers with room to the right: a new token is written, not concatenated."""

    rooms: tuple[Tensor, Tensor]  # the buffers
    filled = 0  # columns of them in use

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append states and return all (the interface of transformers)."""
        states = (key_states, value_states)
        if not self.is_initialized:  # copied: values are a view of all that q, k and v were computed to
            return self._hold((key_states.contiguous(), value_states.contiguous()), key_states.shape[2])
        total = self.filled + key_states.shape[2]
        if total > self.rooms[0].shape[2]:
            more = total - self.filled + _ROOM
            keys, values = (
                torch.cat([room[:, :, : self.filled], room.new_zeros(*room.shape[:2], more, room.shape[3])], dim=2)
                for room in self.rooms
            )
            self.rooms = keys, values
        for room, new in zip(self.rooms, states, strict=True):
            room[:, :, self.filled : total] = new
        return self._hold(self.rooms, total)

    def _hold(self, rooms: tuple[Tensor, Tensor], filled: int) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(*rooms)
        self.rooms, self.filled = rooms, filled
        self.keys, self.values = keys, values = rooms[0][:, :, :filled], rooms[1][:, :, :filled]
        return keys, values

    def close_up(self, order_LC: Tensor, length: int) -> None:
        """Lay each row's columns out anew, in this order, and keep the last `length`."""
        at = order_LC[:, None, -length:, None]
        keys, values = (
            room[:, :, : self.filled].gather(2, at.expand(-1, room.shape[1], -1, room.shape[3])) for room in self.rooms
        )
        self._hold((keys, values), length)

    @classmethod
    def merged(cls, parts: Sequence[tuple["_RoomyLayer", Tensor, Tensor]], rows: int, length: int) -> "_RoomyLayer":
        """A layer of `rows` rows and `length` columns out of rows of others: (layer, its rows, their new places).

        Columns are aligned to the right; new padding holds zeros, since attention multiplies it by 0.
        """
        rooms = []
        for kind in (0, 1):
            like = parts[0][0].rooms[kind]
            room = like.new_zeros(rows, like.shape[1], length + _ROOM, like.shape[3])
            for source, taken, places in parts:
                held = source.rooms[kind][:, :, max(source.filled - length, 0) : source.filled]
                room[places, :, length - held.shape[2] : length] = held[taken]
            rooms.append(room)
        layer = cls()
        layer._hold((rooms[0], rooms[1]), length)
        return layer


class BackboneSession:
    """Rows on their way through a backbone: `admit_rows` lets them come and go, `step` advances all.

    Afterwards `logits` are those behind each token of the step. `rewind` takes a row's last tokens back: their columns
    stay and are not looked at, until there are many and the rows close up. Any number of these may share a backbone.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self._device = backbone, backbone.device
        self.rows: dict[str, Tensor] = {}  # per lane, the rows it serves, ascending
        self._seated: list[tuple[str, int]] = []  # lane and row of every block row, lane by lane
        self._blocks: list[Block] = []
        self._cache = Cache(layer_class_to_replicate=_RoomyLayer)
        self._length_L = torch.zeros(0, dtype=torch.long, device=self._device)  # tokens read so far
        self._seen_LC = torch.zeros(0, 0, dtype=torch.bool, device=self._device)  # columns that hold a row's tokens
        self._waiting_L: Tensor | None = None  # the last prompt token of new rows, −1 at the others
        self._logits_LTV: Tensor | None = None

    def admit_rows(
        self, kept: Sequence[int], prompts: Sequence[Sequence[int]], newcomers: Sequence[tuple[int, Collection[str]]]
    ) -> None:
        """Let rows go, move the others together, and admit new ones behind them.

        A prompt is read once per lane, whatever the number of its rows; its last token is left to the next `step`.

        Args:
            kept: the rows that stay, ascending; they are numbered anew from 0.
            prompts: token ids, at least one each.
            newcomers: per new row, its place in `prompts` and the lanes that serve it (others' lanes are ignored).
        """
        if not self._seen_LC.equal(self._aligned(self._seen_LC.shape[1])):
            self._close_up()
        number = {row: new for new, row in enumerate(kept)}
        new = [self._backbone.own(lanes) for _, lanes in newcomers]
        names = self._backbone.own({lane for lane, _ in self._seated}.union(*new))
        rank = {lane: at for at, lane in enumerate(names)}
        read = sorted(
            {(rank[lane], prompt) for (prompt, _), lanes in zip(newcomers, new, strict=True) for lane in lanes}
        )
        # The block rows to be, lane by lane: lane, row, and either the place it has now or the prompt it begins with.
        admitted = sorted(
            [(rank[lane], number[row], place, -1) for place, (lane, row) in enumerate(self._seated) if row in number]
            + [(rank[lane], len(kept) + row, -1, newcomers[row][0]) for row, lanes in enumerate(new) for lane in lanes]
        )
        fresh, fresh_length = self._read([names[at] for at, _ in read], [prompts[prompt][:-1] for _, prompt in read])
        spots = [
            self._index([spot for spot, (_, _, place, _) in enumerate(admitted) if place >= 0]),
            self._index([spot for spot, (_, _, _, prompt) in enumerate(admitted) if prompt >= 0]),
        ]
        taken = [
            self._index([place for _, _, place, _ in admitted if place >= 0]),
            self._index([read.index((at, prompt)) for at, _, _, prompt in admitted if prompt >= 0]),
        ]
        lengths = [self._length_L[taken[0]], fresh_length[taken[1]]]
        self._length_L = torch.zeros(len(admitted), dtype=torch.long, device=self._device)
        for spot, length in zip(spots, lengths, strict=True):
            self._length_L[spot] = length
        self._merge([self._cache, fresh], taken, spots, len(admitted))
        first_L = self._index([prompts[prompt][-1] if prompt >= 0 else -1 for _, _, _, prompt in admitted])
        self._waiting_L = first_L if newcomers else None
        self._seated = [(names[at], row) for at, row, _, _ in admitted]
        self._blocks = blocks_of([lane for lane, _ in self._seated])
        self.rows = {
            lane: self._index([row for _, row in self._seated[first:last]]) for lane, first, last in self._blocks
        }

    def step(self, tokens_BT: Tensor) -> None:
        """Append each row's tokens in every lane that serves the row; the first of a new row is its prompt's last."""
        tokens_LT = torch.cat([tokens_BT.to(self._device)[rows_b] for rows_b in self.rows.values()])
        if self._waiting_L is not None:
            tokens_LT[:, 0] = torch.where(self._waiting_L < 0, tokens_LT[:, 0], self._waiting_L)
            self._waiting_L = None
        self._backbone.adapted.serve(self._blocks, step=True)
        count = tokens_LT.shape[1]
        position_LT = self._length_L[:, None] + torch.arange(count, device=self._device)
        self._length_L += count
        self._seen_LC = F.pad(self._seen_LC, (0, count), value=True)
        self._logits_LTV = self._backbone.adapted.model(
            input_ids=tokens_LT,
            attention_mask=self._seen_LC,
            position_ids=position_LT.clamp_max(self._backbone.context - 1),
            past_key_values=self._cache,
            use_cache=True,
        ).logits

    def rewind(self, counts_B: Tensor) -> None:
        """Take back the last tokens of each row, so many as `counts_B` says: never more than the last step appended."""
        counts_L = torch.cat([counts_B.to(self._device)[rows_b] for rows_b in self.rows.values()])
        columns = self._seen_LC.shape[1]
        self._seen_LC &= torch.arange(columns, device=self._device) < (columns - counts_L)[:, None]
        self._length_L -= counts_L
        # A window of attention counts columns and not tokens, so there the rows always lie close.
        if self._backbone.windowed or columns > int(self._length_L.max()) + _ROOM:
            self._close_up()

    def logits(self, lane: str, place: int = -1) -> Tensor:
        """The lane's next-token logits at the rows it serves, in the order of `rows[lane]`: logits_bV.

        Args:
            lane: one that serves a row.
            place: behind which token of the last step.
        """
        assert self._logits_LTV is not None
        first, last = next((first, last) for name, first, last in self._blocks if name == lane)
        return self._logits_LTV[first:last, place]

    def _close_up(self) -> None:
        """Let go of columns between and before the tokens of rows; each row stays aligned to the right."""
        length = int(self._length_L.max()) if len(self._length_L) else 0
        order_LC = self._seen_LC.int().argsort(dim=1, stable=True)
        for layer in cast(list[_RoomyLayer], self._cache.layers):
            layer.close_up(order_LC, length)
        self._seen_LC = self._aligned(length)

    def _aligned(self, columns: int) -> Tensor:
        """Where the tokens of rows stand that lie close and are aligned to the right: seen_LC."""
        return torch.arange(columns, device=self._device) >= (columns - self._length_L)[:, None]

    def _read(self, lanes: Sequence[str], prompts: Sequence[Sequence[int]]) -> tuple[Cache, Tensor]:
        """The cache of prompts read by lanes (grouped, in order), and how many tokens each has."""
        cache = Cache(layer_class_to_replicate=_RoomyLayer)
        length_L = self._index([len(prompt) for prompt in prompts])
        if not any(map(len, prompts)):
            return cache, length_L
        self._backbone.adapted.serve(blocks_of(lanes), step=False)
        ids_LT, mask_LT = left_pad(prompts, self._backbone.prompter.eos, self._device)
        self._backbone.adapted.model.base_model(
            input_ids=ids_LT,
            attention_mask=mask_LT,
            position_ids=(mask_LT.cumsum(-1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
        )
        return cache, length_L

    def _merge(self, caches: Sequence[Cache], taken: Sequence[Tensor], spots: Sequence[Tensor], rows: int) -> None:
        """One cache out of the taken rows of others, as short as its longest row allows."""
        columns = int(self._length_L.max()) if rows else 0
        parts = [
            (cast(list[_RoomyLayer], cache.layers), from_b, to_b)
            for cache, from_b, to_b in zip(caches, taken, spots, strict=True)
            if len(from_b) and cache.layers
        ]
        self._cache, self._seen_LC = Cache(layer_class_to_replicate=_RoomyLayer), self._aligned(columns)
        while columns and parts[0][0]:  # layer by layer, so that old and new are never held whole together
            self._cache.layers.append(
                _RoomyLayer.merged([(layers.pop(0), from_b, to_b) for layers, from_b, to_b in parts], rows, columns)
            )

    def _index(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.long, device=self._device)


def blocks_of(lanes: Sequence[str]) -> list[Block]:
    """Where each lane's block begins and ends, given the lane of every block row; a lane's rows lie together."""
    return [(lane, lanes.index(lane), lanes.index(lane) + lanes.count(lane)) for lane in dict.fromkeys(lanes)]
