"""Decoding with reward models over texts or prefixes: what the searches share.

Shapes: B rows, V vocabulary, D features.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.config.errors import UserError
from pipeline.decoding.guidance import cut, draw, kl_divergence, normalised, random_stream
from pipeline.decoding.request import Generation, Request
from pipeline.generation.methods.lookahead_cache import LookaheadCache
from pipeline.models.prompting import Prompter, ends_of


@dataclass
class Found:
    """A row on its way: its tokens and what is summed over them."""

    request: Request
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logp: float = 0.0
    logp_base: float = 0.0
    kl: float = 0.0
    forwards: int = 0
    finish: str | None = None

    def ended(self, ends: frozenset[int]) -> bool:
        """Note whether the last token ended the row."""
        if self.finish is None and self.tokens and self.tokens[-1] in ends:
            self.finish = "eos"
        elif self.finish is None and len(self.tokens) >= self.request.max_new_tokens:
            self.finish = "length"
        return self.finish is not None


Reward = TypeVar("Reward")
Weights = Mapping[str, Tensor]  # of the objectives that any row weighs: weight_B
Readings = Mapping[str, LookaheadCache]  # what is read beside the base, by objective


class Search(ABC, Generic[Reward]):
    """A base whose responses reward models look for, with the face of `GuidedDecoder`.

    A request's weights name the reward models and how much each counts.

    Args:
        model: the base, a causal LM.
        prompter: its tokenizer and template.
        rewards: per objective.
        batch_size: rows at once.
    """

    def __init__(self, model: Any, prompter: Prompter, rewards: Mapping[str, Reward], batch_size: int) -> None:
        self._model, self._prompter, self._rewards = model, prompter, dict(rewards)
        self._batch_size = batch_size
        self._ends = ends_of(prompter, model.generation_config)

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """The chunks that are worked off one after the other: rows of like prompt length.

        Raises:
            UserError: a request asks for what searches do not do.
        """
        for request in requests:
            if request.stop or request.top_k or request.top_p < 1 or request.min_p or request.temperature != 1:
                raise UserError(
                    "searches with reward models sample at temperature 1 and know no stop texts: leave out "
                    "decoding.stop, top_k, top_p and min_p."
                )
            if unknown := request.arms.keys() - self._rewards.keys():
                raise UserError(f"there is no reward model for {min(unknown)}: train it (tune.rivals).")
        lengths = [len(self._prompter.prompt_ids(request.prompt)) for request in requests]
        order = sorted(range(len(requests)), key=lambda place: (lengths[place], requests[place].prompt, place))
        return [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], progress: str | None = None) -> Iterator[tuple[int, Generation]]:
        """Yield (index into `requests`, generation) as chunks finish, under a progress bar called `progress`."""
        with tqdm(total=len(requests), desc=progress, unit="row", disable=progress is None) as bar:
            for chunk in self.plan(requests):
                rows = [Found(requests[i], self._prompter.prompt_ids(requests[i].prompt)) for i in chunk]
                self.search(rows)
                bar.update(len(rows))
                yield from zip(chunk, map(self._finished, rows), strict=True)

    @abstractmethod
    def search(self, rows: list[Found]) -> None:
        """Bring all rows to their end."""

    def _finished(self, row: Found) -> Generation:
        text = self._prompter.spell(row.tokens).strip()
        sums = row.logp, row.logp_base, row.kl
        return Generation(text, len(row.prompt), row.tokens, row.finish or "length", *sums, forwards=row.forwards)

    def _logps(self, hidden_BD: Tensor) -> Tensor:
        """The base's next-token law: logps_BV."""
        return normalised(cut(self._model.get_output_embeddings()(hidden_BD), self._prompter.vocab_size))

    def _reading(self, backbone: Any, rows: Sequence[Found]) -> LookaheadCache:
        return LookaheadCache(backbone, [[*row.prompt, *row.tokens] for row in rows], self._prompter.eos)

    def _weights(self, rows: Sequence[Found]) -> dict[str, Tensor]:
        """Of the objectives that any row weighs: weight_B."""
        weights = {
            name: torch.tensor([row.request.arms.get(name, 0.0) for row in rows], device=self._model.device)
            for name in self._rewards
        }
        return {name: weight_B for name, weight_B in weights.items() if bool((weight_B != 0).any())}

    def _uniforms(self, rows: Sequence[Found]) -> Tensor:
        """The numbers that draw the rows' tokens: uniform_BT in float64."""
        streams = [random_stream(row.request.stream, row.request.max_new_tokens).tolist() for row in rows]
        longest = max(map(len, streams))
        padded = [row + [0.0] * (longest - len(row)) for row in streams]
        return torch.tensor(padded, dtype=torch.float64, device=self._model.device)


class TokenSearch(Search[Reward]):
    """`Search` token by token, by a law that is exact: so is its KL to the base."""

    def search(self, rows: list[Found]) -> None:
        """Draw token by token; rows that have ended are computed on, and nothing of that is kept."""
        weights, uniforms_BT = self._weights(rows), self._uniforms(rows)
        base = self._reading(self._model.base_model, rows)
        readings = self.readings(rows, weights)
        for step in range(uniforms_BT.shape[1]):
            base_BV = self._logps(base.last_BD)
            law_BV = self.law(base_BV, weights, base, readings)
            tokens_B = draw(law_BV, uniforms_BT[:, step])
            drawn_B1 = tokens_B[:, None]
            sums = [law_BV.gather(1, drawn_B1)[:, 0], base_BV.gather(1, drawn_B1)[:, 0], kl_divergence(law_BV, base_BV)]
            self._add(rows, tokens_B, torch.stack(sums, dim=1))
            if all(row.ended(self._ends) for row in rows):
                return
            for reading in (base, *readings.values()):
                reading.read(drawn_B1)

    @abstractmethod
    def law(self, base_BV: Tensor, weights: Weights, base: LookaheadCache, readings: Readings) -> Tensor:
        """Log-probabilities of the next token: law_BV.

        Args:
            base_BV: those of the base.
            weights: how much each objective counts.
            base, readings: what the base and the models of `readings` have read.
        """

    def readings(self, rows: Sequence[Found], weights: Mapping[str, Tensor]) -> dict[str, LookaheadCache]:
        """What is read beside the base, by objective."""
        return {}

    def forwards(self, objectives: int) -> int:
        """Positions computed for one token, the base's among them."""
        return 1

    def _add(self, rows: list[Found], tokens_B: Tensor, sums_B3: Tensor) -> None:
        for row, token, (logp, logp_base, kl) in zip(rows, tokens_B.tolist(), sums_B3.tolist(), strict=True):
            if row.finish is None:
                row.tokens.append(token)
                row.logp, row.logp_base, row.kl = row.logp + logp, row.logp_base + logp_base, row.kl + kl
                row.forwards += self.forwards(len(row.request.arms))  # its own, whatever the rows beside it ask for
