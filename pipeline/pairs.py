"""Preference pairs as batches of tensors: grouped by prompt, collated, and served in an order that can be resumed.

Shapes: B prompts of a batch, T positions, N response tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from pipeline.config import UserError
from pipeline.models import Prompter
from pipeline.store import Row, digest

_GROUP_SIZE = 8  # responses that share one row at most


@dataclass
class PromptGroup:
    """A tokenised prompt, its distinct responses (end-of-sequence included where they ended), the pairs among them."""

    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]  # (chosen, rejected) as places in `responses`


def tokenise(pairs: Sequence[Row], prompter: Prompter, context: int, origin: str) -> list[PromptGroup]:
    """Pairs grouped by prompt, so that a prompt and each of its distinct responses are computed once.

    Raises:
        UserError: a pair does not fit into the context.
    """
    groups: list[PromptGroup] = []
    current: dict[str, tuple[PromptGroup, dict[str, int]]] = {}
    for pair in pairs:
        group, places = current.get(pair["prompt"], (None, {}))
        if group is None or len(group.responses) + 2 > _GROUP_SIZE:
            group, places = PromptGroup(prompter.prompt_ids(pair["prompt"]), [], []), {}
            current[pair["prompt"]] = group, places
            groups.append(group)
        for side in ("chosen", "rejected"):
            text = pair[side]
            if text not in places:
                places[text] = len(group.responses)
                group.responses.append(prompter.response_ids(text, pair.get(f"{side}_ended", True)))
        group.pairs.append((places[pair["chosen"]], places[pair["rejected"]]))
        length = len(group.prompt) + max(len(group.responses[place]) for place in group.pairs[-1])
        if length > context:
            raise UserError(
                f"{origin}, id {pair['id']}: prompt and response have {length} tokens, the model's context is "
                f"{context}: shorten or remove the row."
            )
    return groups


def collate(groups: Sequence[PromptGroup], pad: int) -> dict[str, Tensor]:
    """One row per prompt: the prompt flush right, then its responses one after another.

    A response sees the prompt and itself, not its siblings (`segments`), and its positions go on from the prompt, so
    every log-probability is that of prompt and response alone.

    Returns:
        ids, positions, segments [B, T]: a segment is 0 in the prompt, 1, 2, … in the responses, -1 in padding.
        row, column, label, response [N]: for each response token the row and column that predict it, itself, and the
        response it belongs to.
        chosen, rejected [pairs]: places among all responses of the batch.
    """
    width = max(len(group.prompt) for group in groups)
    reach = max(sum(map(len, group.responses)) for group in groups)
    shape = len(groups), width + reach
    ids, positions = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, -1)
    targets: list[tuple[int, int, int, int]] = []
    chosen, rejected, first = [], [], 0
    for row, group in enumerate(groups):
        start, length = width - len(group.prompt), len(group.prompt)
        ids[row, start:width], segments[row, start:width] = torch.tensor(group.prompt), 0
        positions[row, start:width] = torch.arange(length)
        column = width
        for number, tokens in enumerate(group.responses):
            stop = column + len(tokens)
            ids[row, column:stop], segments[row, column:stop] = torch.tensor(tokens), number + 1
            positions[row, column:stop] = torch.arange(length, length + len(tokens))
            predicting = [width - 1, *range(column, stop - 1)]
            targets += [(row, at, token, first + number) for at, token in zip(predicting, tokens, strict=True)]
            column = stop
        chosen += [first + better for better, _ in group.pairs]
        rejected += [first + worse for _, worse in group.pairs]
        first += len(group.responses)
    named = zip(("row", "column", "label", "response"), torch.tensor(targets).unbind(1), strict=True)
    return {
        "ids": ids, "positions": positions, "segments": segments, **dict(named),
        "chosen": torch.tensor(chosen), "rejected": torch.tensor(rejected),
    }  # fmt: skip


class EpochBatches(Sampler[list[int]]):
    """Batches of indices in an order fixed by seed and epoch, which can start in the middle of an epoch."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._epoch = 0
        self.start = 0
        self.served = 0  # batches handed out in this epoch, those before `start` included

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(int(digest([self._seed, self._epoch])[:15], 16))
        order = torch.randperm(self._count, generator=generator).tolist()
        self.served, self.start = self.start, 0
        while self.served < len(self):
            first = self.served * self._batch_size
            self.served += 1
            yield order[first : first + self._batch_size]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that Lightning can resume in the middle of an epoch (`state_dict` protocol).

    It must run without worker processes, which would fetch ahead of what training has seen.
    """

    def state_dict(self) -> dict[str, int]:
        """Batches served so far in this epoch."""
        assert isinstance(self.batch_sampler, EpochBatches)
        return {"served": self.batch_sampler.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next epoch's iterator where the state says (a finished epoch starts anew)."""
        assert isinstance(self.batch_sampler, EpochBatches)
        self.batch_sampler.start = state["served"] % len(self.batch_sampler)
