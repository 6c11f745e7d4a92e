"""Preference pairs as batches of tensors: grouped by prompt, collated, and served in an order that can be resumed.

Shapes: B prompts of a batch, T positions, N response tokens, S responses.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed import get_rank, is_initialized
from torch.utils.data import DataLoader, Sampler

from pipeline.config.errors import UserError
from pipeline.data.files import Row, digest
from pipeline.models.prompting import Prompter

_GROUP_SIZE = 8  # responses that share one row at most
_WINDOW = 50  # steps whose prompts are sorted by length together: wider spares padding, narrower mixes better


@dataclass
class PromptGroup:
    """A tokenised prompt, its distinct responses (end-of-sequence included where they ended), the pairs among them."""

    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]  # (chosen, rejected) as places in `responses`
    objectives: list[int] = field(default_factory=list)  # of each pair, numbered; none: all pairs are of the first
    number: int = 0  # of the prompt: groups of one prompt share it
    reference: list[float] | None = None  # log π_ref of each response, where the loss compares with it

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass
class Tokenised:
    """The groups of one split, and what did not fit."""

    groups: list[PromptGroup] = field(default_factory=list)
    truncated: int = 0  # groups whose prompt lost its beginning
    dropped: int = 0  # pairs with a response too long for any prompt

    @property
    def pairs(self) -> int:
        """Pairs kept."""
        return sum(len(group.pairs) for group in self.groups)


def tokenise(pairs: Sequence[Row], prompter: Prompter, max_length: int, origin: str) -> Tokenised:
    """Pairs grouped by prompt, so that a prompt and each of its distinct responses are computed once.

    A prompt and a response have at most `max_length` tokens together: a longer prompt keeps its end (and a
    beginning-of-sequence token), and a pair is dropped if one of its responses leaves no room for any of the prompt.

    Raises:
        UserError: no pair fits.
    """
    tokenised = Tokenised()
    current: dict[str, tuple[PromptGroup, dict[tuple[int, ...], int]]] = {}
    numbers: dict[str, int] = {}
    for pair in pairs:
        chosen, rejected = (
            tuple(prompter.response_ids(pair["prompt"], pair[side], pair.get(f"{side}_ended", True)))
            for side in ("chosen", "rejected")
        )
        if max(len(chosen), len(rejected)) > max_length - 2:
            tokenised.dropped += 1
            continue
        group, places = current.get(pair["prompt"], (None, {}))
        if group is None or len(group.responses) + 2 > _GROUP_SIZE:
            number = numbers.setdefault(pair["prompt"], len(numbers))
            group, places = PromptGroup(prompter.prompt_ids(pair["prompt"]), [], [], number=number), {}
            current[pair["prompt"]] = group, places
            tokenised.groups.append(group)
        for ids in (chosen, rejected):
            if ids not in places:
                places[ids] = len(group.responses)
                group.responses.append(list(ids))
        group.pairs.append((places[chosen], places[rejected]))
        group.objectives.append(pair.get("objective", 0))
    if not tokenised.groups:
        what = f"no pair fits into {max_length} tokens: raise trainer.max_length" if pairs else "there is no pair"
        raise UserError(f"{origin}: {what}.")
    start = prompter.tokenizer.bos_token_id
    for group in tokenised.groups:
        room = max_length - max(map(len, group.responses))
        if len(group.prompt) > room:
            first = [start] if group.prompt[0] == start else []
            group.prompt = first + group.prompt[len(group.prompt) - room + len(first) :]
            tokenised.truncated += 1
    return tokenised


def collate(groups: Sequence[PromptGroup], pad: int) -> dict[str, Tensor]:
    """One row per prompt: the prompt, then its responses one after another, then padding.

    A response sees the prompt and itself, not its siblings (`segments`), and its positions go on from the prompt, so
    every log-probability is that of prompt and response alone.

    Returns:
        ids, positions, segments [B, T]: a segment is 0 in the prompt, 1, 2, … in the responses, -1 in padding.
        row, column, label, response [N]: for each response token the row and column that predict it, itself, and the
        response it belongs to.
        last [S, 2]: row and column of each response's last token.
        chosen, rejected, objective, prompt [pairs]: places among all responses of the batch, what the pair is about,
        and the number of its prompt.
        reference [S]: log-probabilities of the responses under the reference, if the groups carry them.
    """
    shape = len(groups), max(map(len, groups))
    ids, positions = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, -1)
    targets: list[tuple[int, int, int, int]] = []
    last: list[tuple[int, int]] = []
    chosen, rejected, objectives, numbers, first = [], [], [], [], 0
    for row, group in enumerate(groups):
        length = column = len(group.prompt)
        ids[row, :length], segments[row, :length] = torch.tensor(group.prompt), 0
        positions[row, :length] = torch.arange(length)
        for number, tokens in enumerate(group.responses):
            stop = column + len(tokens)
            ids[row, column:stop], segments[row, column:stop] = torch.tensor(tokens), number + 1
            positions[row, column:stop] = torch.arange(length, length + len(tokens))
            predicting = [length - 1, *range(column, stop - 1)]
            targets += [(row, at, token, first + number) for at, token in zip(predicting, tokens, strict=True)]
            last.append((row, stop - 1))
            column = stop
        objectives += group.objectives or [0] * len(group.pairs)
        numbers += [group.number] * len(group.pairs)
        chosen += [first + better for better, _ in group.pairs]
        rejected += [first + worse for _, worse in group.pairs]
        first += len(group.responses)
    named = zip(("row", "column", "label", "response"), torch.tensor(targets).unbind(1), strict=True)
    batch = {
        "ids": ids, "positions": positions, "segments": segments, **dict(named), "last": torch.tensor(last),
        "chosen": torch.tensor(chosen), "rejected": torch.tensor(rejected), "objective": torch.tensor(objectives),
        "prompt": torch.tensor(numbers),
    }  # fmt: skip
    if all(group.reference is not None for group in groups):
        batch["reference"] = torch.tensor([logp for group in groups for logp in group.reference or []])
    return batch


@dataclass(frozen=True)
class MicroBatch:
    """What one device computes at once, as places among the groups."""

    places: list[int]
    weight: float  # makes the mean over the step's micro-batches of weight · Σ loss the mean loss of the step's pairs


class StepBatches(Sampler[MicroBatch]):
    """The micro-batches of one process, in an order fixed by seed and epoch, which can start anywhere in an epoch.

    A step takes `batch_size` prompts and deals them out over `world_size` processes × `accumulate` micro-batches; which
    prompts make a step does not depend on those two. Prompts of a step are of like length: within windows of
    `_WINDOW` steps they are sorted, then the steps are shuffled.
    """

    def __init__(
        self, groups: Sequence[PromptGroup], batch_size: int, seed: int, accumulate: int = 1, world_size: int = 1
    ) -> None:
        self._groups, self._batch_size, self._seed = groups, batch_size, seed
        self._accumulate, self._world_size = accumulate, world_size
        self._epoch = 0
        self.start = 0
        self.served = 0  # micro-batches handed out in this epoch, those before `start` included

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self._groups) / self._batch_size) * self._accumulate

    def steps(self) -> list[list[int]]:
        """The prompts of each step of this epoch, as places among the groups, shortest first."""
        generator = torch.Generator().manual_seed(int(digest([self._seed, self._epoch])[:15], 16))
        order = torch.randperm(len(self._groups), generator=generator).tolist()
        size = self._batch_size
        window = size * _WINDOW
        steps = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda place: len(self._groups[place]))
            steps += [near[first : first + size] for first in range(0, len(near), size)]
        return [steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()]

    def __iter__(self) -> Iterator[MicroBatch]:
        rank = get_rank() if is_initialized() else 0
        own = [micro_batch for step in self.steps() for micro_batch in self._dealt(step)[rank :: self._world_size]]
        self.served, self.start = self.start, 0
        while self.served < len(own):
            self.served += 1
            yield own[self.served - 1]

    def _dealt(self, step: list[int]) -> list[MicroBatch]:
        shares = self._accumulate * self._world_size
        pairs = sum(len(self._groups[place].pairs) for place in step)
        bounds = [len(step) * share // shares for share in range(shares + 1)]
        parts = [step[low:high] for low, high in pairwise(bounds)]
        # A share without prompts computes one that counts for nothing: every process must take part in every step.
        return [MicroBatch(part or step[:1], shares / max(1, pairs) if part else 0.0) for part in parts]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over `StepBatches` that Lightning can resume in the middle of an epoch (`state_dict` protocol).

    It must run without worker processes, which would fetch ahead of what training has seen.
    """

    def __init__(self, groups: Sequence[PromptGroup], batches: StepBatches, pad: int) -> None:
        def load(micro_batch: MicroBatch) -> dict[str, Tensor]:
            taken = [groups[place] for place in micro_batch.places]
            return {**collate(taken, pad), "weight": torch.tensor(micro_batch.weight)}

        self.batches = batches
        super().__init__(_Identity(), sampler=batches, batch_size=None, collate_fn=load)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, int]:
        """Micro-batches served so far in this epoch."""
        return {"served": self.batches.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next epoch's iterator where the state says (a finished epoch starts anew)."""
        self.batches.start = state["served"] % len(self.batches)


class _Identity:
    """The sampler says all there is to say about a micro-batch."""

    def __getitem__(self, micro_batch: MicroBatch) -> MicroBatch:
        return micro_batch
