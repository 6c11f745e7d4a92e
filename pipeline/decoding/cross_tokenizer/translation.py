"""The vocabulary of a base in that of an ARM with another tokenizer, as tables made once.

What the base means by a token is more than its bytes: it also says that no longer token of its own is being written. So
the ARM's tokens are dealt out: each belongs to the base's token that begins its text, unless its successor can change
that. Where base and ARM spell alike, that is one token each, and nothing is approximated.

Shapes: V vocabulary of the base, A that of the ARM, M tokens of the ARM that share a base's token.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.decoding.cross_tokenizer.spelling import Spelling

LONGEST = 8  # tokens that the ARM may spell one of the base's with; longer runs (of blanks, say) are left out


@dataclass(frozen=True)
class Translation:
    """What the ARM reads where the base writes.

    Args:
        same: per token of the base, the ARM's token of the same bytes (or, for ends and special ones, of the same
            meaning); −1 without.
        column_V: where in the ARM's vocabulary the say on each base's token stands: at its own counterpart, or at the
            first token that the ARM spells it with; A where it has nothing to say.
        spread_V: whether the ARM spells the token with other tokens than one of the same bytes.
        shared: per base's token that several of the ARM's belong to, those.
        members_M, places_M, columns_P: `shared` as tensors: the tokens, each one's place in `columns_P`, and the
            columns that stand for each group.
    """

    same: list[int]
    column_V: Tensor
    spread_V: Tensor
    shared: dict[int, Tensor]
    members_M: Tensor
    places_M: Tensor
    columns_P: Tensor

    @classmethod
    def between(
        cls, base: Spelling, arm: Spelling, ends: Collection[int], end: int, base_size: int, arm_size: int
    ) -> "Translation":
        """The tables.

        Args:
            base: the base's tokens.
            arm: the ARM's.
            ends: the base's tokens that end a response.
            end: the ARM's that does.
            base_size: V, the tokens that the base's law is over.
            arm_size: A, those that the ARM's is over.
        """
        named = {name: token for token, name in enumerate(arm.names[:arm_size])}
        spelled: dict[bytes, int] = {}
        for token, piece in enumerate(arm.pieces[:arm_size]):
            if piece and (piece not in spelled or arm.spell(piece) == (token,)):
                spelled[piece] = token
        same, columns, spread, begun, nothing = [], [], [], set[int](), arm_size
        for token, (name, piece) in enumerate(zip(base.names[:base_size], base.pieces[:base_size], strict=False)):
            twin = named.get(name, -1)
            if token in ends:
                start_of_span = end
            elif twin >= 0 and arm.pieces[twin] == piece:
                start_of_span = twin
            else:
                start_of_span = spelled.get(piece, -1) if piece else -1
            path = arm.spell(piece) if piece and start_of_span < 0 else ()
            path = path if len(path) <= LONGEST else ()
            begun |= set(path[:1])
            same.append(start_of_span)
            spread.append(bool(path))
            columns.append(start_of_span if start_of_span >= 0 else path[0] if path else nothing)
        # Of several tokens of the same bytes (a letter, and the byte that it is) the base writes one; all say the same.
        counterpart: dict[int, int] = {}
        for place, token in enumerate(same):
            piece = base.pieces[place]
            if token >= 0 and (token not in counterpart or (piece and base.spell(piece) == (place,))):
                counterpart[token] = place
        groups: dict[int, list[int]] = {}
        for token, piece in enumerate(arm.pieces[:arm_size]):
            if token in counterpart:
                groups.setdefault(counterpart[token], []).append(token)
            elif piece and token not in begun:  # else the base's token depends on its successor
                first = next(iter(base.spell(piece)), base_size)
                if first < base_size:
                    groups.setdefault(first, []).append(token)
        shared = {first: start_of_span for first, start_of_span in groups.items() if start_of_span != [same[first]]}
        # A token that the ARM spells with several of its own stands in no column of its own: `lanes` reckons it.
        joint = [first for first in shared if same[first] >= 0]
        alike = {place: counterpart[token] for place, token in enumerate(same) if token >= 0}
        shared |= {place: shared[first] for place, first in alike.items() if first in shared}
        return cls(
            same,
            torch.tensor(columns),
            torch.tensor(spread),
            {first: torch.tensor(start_of_span) for first, start_of_span in shared.items()},
            torch.tensor([token for first in joint for token in shared[first]], dtype=torch.long),
            torch.tensor([place for place, first in enumerate(joint) for _ in shared[first]], dtype=torch.long),
            torch.tensor([same[first] for first in joint], dtype=torch.long),
        )
