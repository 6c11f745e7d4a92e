"""Rows of a base on their way through ARMs with another tokenizer: `admit_rows`, `step` and `ask`.

Where the base draws a token that the ARM has too, the ARM reads that one. Else it reads the canonical spelling of what
the base has written, and keeps it open: its last tokens are read anew if what comes next spells them otherwise. What is
said of a next token of the base is the probability of all the ARM's continuations that begin with it: of one token or
several, that reach just to its end or beyond. Summed exactly are those along the canonical spelling; those that depart
from it before its last token are left out. Asked about are the base's likeliest tokens, those that the ARM spells with
several of its own only where they are likelier still; the law is over these, and `Answers` says how much of the base's
mass is not among them.

Shapes: B rows, b those that any ARM serves, r those that one serves, C candidates, K lanes of a row (its reference the
last), S slots, A vocabulary of the ARMs, V that of the base, P groups and M tokens as in `translation`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.points import REFERENCE
from pipeline.decoding.cross_tokenizer.answers import Answers
from pipeline.decoding.cross_tokenizer.bridge import TokenizerBridge
from pipeline.decoding.cross_tokenizer.rewindable_cache import RewindableCache
from pipeline.decoding.cross_tokenizer.translation import LONGEST

_CHUNK = 256  # of a vocabulary
_Look = tuple[int, int, tuple[int, ...]]  # ahead of a row: how many tokens of a path are known, and those that are not
_HELD = 8  # tokens of an open spelling that may still change; those before them are settled


@dataclass
class _Text:
    """How far a row has been read behind its prompt."""

    prompts: tuple[int, ...]  # tokens of the prompt per cache, less one while its last is still to be read
    first: tuple[int, ...] | None  # the prompt's last token per cache, while that is still to be read
    settled: int = 0  # tokens behind the prompt that stay
    tail: tuple[int, ...] = ()  # tokens behind those, which what comes next may change
    pending: bytes = b""  # what the tail spells
    written: tuple[int, ...] = ()  # the base's tokens of that
    nodes: list[Tensor] = field(default_factory=list)  # where there is a tail: laws before, in and behind it, logps_KA


@dataclass(frozen=True)
class _Turn:
    """What a token of the base makes of a row."""

    whole: tuple[int, ...]  # the tail with all that is settled now
    settled: int  # how many tokens of it that is
    pending: bytes
    written: tuple[int, ...]


@dataclass(frozen=True)
class _Reach:
    """A next token of the base whose continuations are summed up."""

    row: int
    token: int
    text: bytes  # with what is pending
    path: tuple[int, ...]  # the canonical spelling of that
    look: int | None  # which look ahead has the laws behind the tokens that have not been read
    known: int  # tokens of the path that have


class CrossTokenizerSession:
    """One session of rows; any number may share a bridge.

    Args:
        bridge: the ARMs, and what their tokens mean to the base.
        device: where the base's logits are.
    """

    def __init__(self, bridge: TokenizerBridge, device: torch.device) -> None:
        self._serving, self._device, self._table = bridge.serving, device, bridge.table
        self._column_V, self._spread_V = self._table.column_V.to(device), self._table.spread_V.to(device)
        self._mute_V, self._top_k = self._column_V == bridge.arm_size, bridge.candidates
        self._base, self._arm, self._pieces = bridge.base, bridge.arm, bridge.pieces
        self._caches = [RewindableCache(backbone) for backbone in bridge.backbones]
        self._size = bridge.arm_size
        self._ends = bridge.ends
        self._path = bridge.path
        self._texts: list[_Text] = []
        self._raw = [torch.zeros(0, self._size, device=cache.backbone.device) for cache in self._caches]  # logps_SA
        self._places: list[list[tuple[int, int]]] = []  # per row, cache and slot of each of its lanes
        self._named: list[list[str]] = []  # per row, those lanes
        self.rows: dict[str, Tensor] = {}  # per lane, the rows it serves, ascending

    def admit_rows(
        self, kept: Sequence[int], prompts: Sequence[Sequence[Sequence[int]]], served: Sequence[Collection[str]]
    ) -> None:
        """Let rows go, and admit new ones behind those that stay.

        Args:
            kept: the rows that stay, ascending; they are numbered anew from 0.
            prompts: per new row and backbone, token ids.
            served: per new row, the lanes that serve it; the reference serves with any.
        """
        lanes = [self._serving(named) for named in served]
        stay = set(kept)
        old = [[place for place, (_, row) in enumerate(cache.slots) if row in stay] for cache in self._caches]
        for number, cache in enumerate(self._caches):
            distinct = sorted({tuple(one[number]) for one in prompts})
            newcomers = [(distinct.index(tuple(one[number])), of) for one, of in zip(prompts, lanes, strict=True)]
            cache.admit_rows(kept, distinct, newcomers)
        self._texts = [self._texts[row] for row in kept]
        self._texts += [_Text(tuple(len(each) - 1 for each in one), tuple(each[-1] for each in one)) for one in prompts]
        here = [{slot: place for place, slot in enumerate(cache.slots)} for cache in self._caches]
        self._named = [
            sorted((lane for at in here for lane, of in at if of == row), key=lambda lane: lane == REFERENCE)
            for row in range(len(self._texts))
        ]
        self._places = [
            [next((number, at[lane, row]) for number, at in enumerate(here) if (lane, row) in at) for lane in named]
            for row, named in enumerate(self._named)
        ]
        for number, cache in enumerate(self._caches):
            stays = [place for place, (_, row) in enumerate(cache.slots) if row < len(kept)]
            raw = self._raw[number].new_zeros(len(cache.slots), self._size)
            raw[stays] = self._raw[number][old[number]]
            self._raw[number] = raw
        self.rows = {
            lane: torch.tensor([row for row, named in enumerate(self._named) if lane in named], device=self._device)
            for lane in dict.fromkeys(lane for named in self._named for lane in named)
        }

    def step(self, tokens_B: Tensor, alive: Sequence[bool]) -> None:
        """Read what the base has drawn; new rows read the last token of their prompt instead.

        Args:
            tokens_B: each row's last token.
            alive: which rows go on; the others read nothing any more.

        Raises:
            UserError: the context of an ARM is full.
        """
        reads: dict[int, tuple[int, ...]] = {}
        turns: dict[int, _Turn] = {}
        for row, (text, token) in enumerate(zip(self._texts, tokens_B.tolist(), strict=True)):
            if self._named[row] and text.first is None and alive[row]:
                turn = turns[row] = self._turn(text, token)
                known = len(_common(text.tail, turn.whole))
                reads[row] = turn.whole[known:]
                opens = turn.settled < len(turn.whole)
                text.nodes = (text.nodes or [self._laws(row)])[: known + 1] if opens or text.tail else []
                text.tail = text.tail[:known]
        self._read_early({row: read[:-1] for row, read in reads.items() if len(read) > 1})
        self._read_last({row: read[-1] for row, read in reads.items() if read})
        for row, text in enumerate(self._texts):
            if row in turns:
                turn = turns[row]
                if text.nodes and reads[row]:
                    text.nodes.append(self._laws(row))
                text.settled, text.tail = text.settled + turn.settled, turn.whole[turn.settled :]
                text.pending, text.written = turn.pending, turn.written
                text.nodes = text.nodes[turn.settled :] if text.tail else []
            elif text.first is not None:
                text.prompts, text.first = tuple(size + 1 for size in text.prompts), None

    def _read_early(self, reads: Mapping[int, tuple[int, ...]]) -> None:
        """Read what few rows have to read before their last token, apart: the others need not wait for it."""
        laws: dict[tuple[int, int], Tensor] = {}
        for number, cache in enumerate(self._caches):
            slots = [slot for slot, (_, row) in enumerate(cache.slots) if row in reads]
            if slots:
                rows = [cache.slots[slot][1] for slot in slots]
                found_STA = cache.read(slots, [self._end(row, number) for row in rows], [reads[row] for row in rows])
                laws |= {(number, slot): laws_TA for slot, laws_TA in zip(slots, found_STA, strict=True)}
        for row, read in reads.items():
            text = self._texts[row]
            if text.nodes:
                each = [laws[place][:, : self._size] for place in self._places[row]]
                text.nodes += [torch.stack([laws_TA[at] for laws_TA in each]) for at in range(len(read))]
            text.tail += read

    def _read_last(self, tokens: Mapping[int, int]) -> None:
        """Read one token of every row; one that has none has any put behind its end, where its next one will stand."""
        for number, cache in enumerate(self._caches):
            if not cache.slots:
                continue
            texts = [self._texts[row] for _, row in cache.slots]
            last = [
                [text.first[number] if text.first else tokens.get(row, 0)]
                for text, (_, row) in zip(texts, cache.slots, strict=True)
            ]
            raw_SA = cache.read(None, [self._end(row, number) for _, row in cache.slots], last)[:, 0, : self._size]
            for slot, (text, (lane, row)) in enumerate(zip(texts, cache.slots, strict=True)):
                if text.first is None and row not in tokens:
                    kept = text.nodes[-1][self._named[row].index(lane)] if text.nodes else self._raw[number][slot]
                    raw_SA[slot] = kept
            self._raw[number] = raw_SA

    def _end(self, row: int, number: int) -> int:
        """The position behind all that a row has on a cache."""
        text = self._texts[row]
        return text.prompts[number] + text.settled + len(text.tail)

    def _laws(self, row: int) -> Tensor:
        """The next-token laws where a row ends, logps_KA."""
        return torch.stack([self._raw[number][slot] for number, slot in self._places[row]])

    def _turn(self, text: _Text, token: int) -> _Turn:
        same, piece = self._table.same[token], self._pieces[token]
        if piece is None:  # an end, or a special token
            if same < 0:
                return _Turn(text.tail, 0, text.pending, text.written)
            return _Turn((*text.tail, same), len(text.tail) + 1, b"", ())
        path, closed = self._path(text.pending, text.written, text.tail, token)
        if closed and token not in self._table.shared:
            return _Turn(path, len(path), b"", ())
        if closed:
            return _Turn(path, len(path) - 1, piece, (token,))
        settled = max(0, len(path) - _HELD)
        pending = (text.pending + piece)[len(self._arm.joined(path[:settled])) :]
        return _Turn(path, settled, pending, () if settled else (*text.written, token))

    def ask(self, base_BV: Tensor, named: Collection[str]) -> Answers:
        """What the ARMs say of the next token.

        Args:
            base_BV: the base's logits.
            named: the lanes that are wanted; there must be rows that the reference serves.
        """
        rows_b = self.rows[REFERENCE]
        tokens_bC, asked_bC, uncovered_b, sums = self._candidates(base_BV)
        base_bC = base_BV[rows_b[:, None], tokens_bC].float()
        place_of = {row: place for place, row in enumerate(rows_b.tolist())}
        of_reference = self._slots(REFERENCE)
        values = {}
        for lane in sorted(self.rows.keys() & named):
            rows = self.rows[lane].tolist()
            places = [place_of[row] for row in rows]
            places_r = torch.tensor(places, device=self._device)
            values_rC = base_bC[places_r]
            if lane != REFERENCE:
                reference_rA = self._of([of_reference[place] for place in places])
                values_rC += self._ratio(self._of(self._slots(lane)), reference_rA, tokens_bC[places_r])
                at = {row: place for place, row in enumerate(rows)}
                for reach, column, sum_K in sums:
                    if reach.row in at:
                        value = sum_K[self._named[reach.row].index(lane)] - sum_K[-1]
                        values_rC[at[reach.row], column] = base_bC[place_of[reach.row], column] + value
            values[lane] = places_r, values_rC
        uncovered_B = torch.zeros(len(base_BV), dtype=torch.float64, device=self._device)
        uncovered_B[rows_b] = uncovered_b
        return Answers(rows_b, tokens_bC, asked_bC, values, uncovered_B)

    def _slots(self, lane: str) -> list[tuple[int, int]]:
        """RewindableCache and slot of a lane at each of the rows it serves."""
        return [
            (number, slot)
            for number, cache in enumerate(self._caches)
            for slot, (name, _) in enumerate(cache.slots)
            if name == lane
        ]

    def _of(self, slots: Sequence[tuple[int, int]]) -> Tensor:
        """The laws at slots of one cache, logps_bA."""
        return self._raw[slots[0][0]][[slot for _, slot in slots]]

    def _ratio(self, arm_rA: Tensor, reference_rA: Tensor, tokens_rC: Tensor) -> Tensor:
        """log P_arm − log P_ref of candidates alone, or of the first token of their spelling: ratio_rC."""
        table = self._table
        ratio_rA = arm_rA - reference_rA
        if len(table.members_M):
            arm_rP, reference_rP = (self._together(laws_rA) for laws_rA in (arm_rA, reference_rA))
            ratio_rA[:, table.columns_P.to(ratio_rA.device)] = (arm_rP - reference_rP).to(ratio_rA)
        return F.pad(ratio_rA.to(self._device), (0, 1)).gather(1, self._column_V[tokens_rC])

    def _together(self, laws_bA: Tensor) -> Tensor:
        """The log-probability of each group of the ARM's tokens that belongs to one of the base, logps_bP."""
        table = self._table
        probs_bM = laws_bA[:, table.members_M.to(laws_bA.device)].double().exp()
        sums_bP = probs_bM.new_zeros(len(laws_bA), len(table.columns_P))
        return sums_bP.index_add_(1, table.places_M.to(laws_bA.device), probs_bM).log_()

    def _sums(self, reaches: Sequence[_Reach], looks: Sequence[_Look]) -> list[Tensor]:
        """log P of next tokens that are more than one token of the ARM, in every lane: sum_K.

        Less the tail's own log P, which what is said of all other tokens leaves out as well.
        """
        ahead = self._looked(looks)
        sums = []
        for reach in reaches:
            text = self._texts[reach.row]
            nodes = (text.nodes or [self._laws(reach.row)])[: reach.known + 1]
            nodes = nodes if reach.look is None else [*nodes, *ahead[reach.look]]
            before_K = own_K = nodes[0].new_zeros(len(nodes[0]))
            for node_KA, token in zip(text.nodes, text.tail, strict=False):
                own_K = own_K + node_KA[:, token]
            parts, left = [], reach.text
            for place, (node_KA, token) in enumerate(zip(nodes, reach.path, strict=True)):
                covers = self._covers(reach, left, alone=place == 0 and not text.pending)
                if len(covers):
                    parts.append(before_K + node_KA[:, covers].logsumexp(-1))
                before_K = before_K + node_KA[:, token]
                left = left[len(self._arm.pieces[token] or b"") :]
            sums.append(torch.stack(parts).logsumexp(0) - own_K)
        return sums

    def _covers(self, reach: _Reach, left: bytes, alone: bool) -> Tensor:
        """The ARM's tokens that reach to a text's end or beyond; where nothing is pending, those that belong to it."""
        covers = self._table.shared.get(reach.token, torch.zeros(0, dtype=torch.long)) if alone else None
        covers = self._arm.covering(left) if covers is None else covers
        return covers[covers < self._size]

    def _candidates(self, base_BV: Tensor) -> tuple[Tensor, Tensor, Tensor, list[tuple[_Reach, int, Tensor]]]:
        """The candidates, which of them are asked about, the base's mass on other tokens, and what is summed up.

        Returns:
            tokens_bC, asked_bC, uncovered_b, and per candidate that is more than one token of the ARM its column and
            log P in every lane, sum_K.
        """
        rows = self.rows[REFERENCE]
        logits_bV = base_BV if len(rows) == len(base_BV) else base_BV[rows]
        top_bK, token_bK = _top(logits_bV, min(self._top_k, logits_bV.shape[1]))
        whole_b1 = logits_bV.float().logsumexp(-1, keepdim=True)
        probs_bK = (top_bK.float() - whole_b1).exp()
        likely_bK, spread_bK = probs_bK >= 2 / self._top_k, self._spread_V[token_bK]
        asked_bK = torch.where(spread_bK, likely_bK, ~self._mute_V[token_bK])
        # Ends whatever their rank: else the base alone would say when not to end.
        ends_E = torch.tensor(self._ends, device=self._device)
        asked_bK &= ~torch.isin(token_bK, ends_E)
        reaches, columns, looks = [], [], dict[_Look, int]()
        for place, (row, tokens) in enumerate(zip(rows.tolist(), token_bK.tolist(), strict=True)):
            text = self._texts[row]
            summed_K = asked_bK[place] & (likely_bK[place] if text.pending else spread_bK[place])
            for column in summed_K.nonzero()[:, 0].tolist():
                token = tokens[column]
                piece = self._pieces[token]
                if piece is None:
                    continue
                path, closed = self._path(text.pending, text.written, text.tail, token)
                if closed:
                    continue  # said already: the ARM has the very token
                known = len(_common(text.tail, path[:-1]))
                further = (row, known, path[known:-1])
                if not path or len(further[-1]) > LONGEST:
                    asked_bK[place, column] = False
                    continue
                look = looks.setdefault(further, len(looks)) if further[-1] else None
                reaches.append(_Reach(row, token, text.pending + piece, path, look, known))
                columns.append(column)
        sums = list(zip(reaches, columns, self._sums(reaches, list(looks)), strict=True))
        ends_bE = (logits_bV[:, self._ends].float() - whole_b1).exp()
        uncovered_b = 1 - (probs_bK * asked_bK).sum(-1, dtype=torch.float64) - ends_bE.sum(-1)
        tokens_bC = torch.cat([token_bK, ends_E.expand(len(rows), -1)], dim=1)
        return tokens_bC, F.pad(asked_bK, (0, len(ends_E)), value=True), uncovered_b, sums

    def _looked(self, looks: Sequence[_Look]) -> list[list[Tensor]]:
        """Per look ahead the laws behind each of its tokens, logps_KA."""
        laws: dict[tuple[int, int, int], Tensor] = {}
        for number, cache in enumerate(self._caches):
            of_row = [[slot for at, slot in self._places[row] if at == number] for row, _, _ in looks]
            lookups = sorted((slot, index) for index, slots in enumerate(of_row) for slot in slots)
            if lookups:
                rows = [looks[index][0] for _, index in lookups]
                ends = [self._end(row, number) - len(self._texts[row].tail) for row in rows]
                starts = [end + looks[index][1] for end, (_, index) in zip(ends, lookups, strict=True)]
                found_STA = cache.look([slot for slot, _ in lookups], starts, [looks[index][2] for _, index in lookups])
                laws |= {(number, *one): laws_TA for one, laws_TA in zip(lookups, found_STA, strict=True)}
        results = []
        for index, (row, _, tokens) in enumerate(looks):
            each = [laws[number, slot, index][:, : self._size] for number, slot in self._places[row]]
            results.append([torch.stack([laws_TA[at] for laws_TA in each]) for at in range(len(tokens))])
        return results


def _top(values_bV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each row's `count` largest values and where they are: they stand in the chunks of the largest maxima."""
    chunks_bNC = F.pad(values_bV, (0, -values_bV.shape[1] % _CHUNK), value=-torch.inf).unflatten(1, (-1, _CHUNK))
    found_bK = chunks_bNC.amax(-1).topk(min(count, chunks_bNC.shape[1]), dim=-1).indices
    picked = chunks_bNC.gather(1, found_bK[:, :, None].expand(-1, -1, _CHUNK)).flatten(1)
    top_bK, at_bK = picked.topk(count, dim=-1)
    return top_bK, found_bK.gather(1, at_bK // _CHUNK) * _CHUNK + at_bK % _CHUNK


def _common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The tokens that both begin with."""
    return [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
