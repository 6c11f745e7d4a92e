"""The batched guided decoder: requests in, generations out as rows finish.

Shapes: P prompts, B rows, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config import UserError
from pipeline.guidance import draw, guided_logps, kl_divergence, random_stream, token_logps
from pipeline.lanes import BASE, Lanes
from pipeline.models import Prompter, check_vocabulary


@dataclass(frozen=True)
class Request:
    """One row to generate."""

    prompt: str
    stream: str  # 32 hex digits: the key of the row's random stream
    max_new_tokens: int
    weights: Mapping[str, float] = field(default_factory=dict)  # α per ARM; ARMs left out have no say
    temperature: float = 1.0

    @property
    def arms(self) -> dict[str, float]:
        """The ARMs that have a say: an ARM at α = 0 is never run."""
        return {name: alpha for name, alpha in self.weights.items() if alpha != 0.0}


@dataclass(frozen=True)
class Generation:
    """One finished row; log-probabilities are sums over its tokens, in nats."""

    text: str
    prompt_tokens: int
    tokens: list[int]  # the end-of-sequence token included, where there is one
    finish: str  # eos | length
    logp: float  # under the law the tokens were drawn from
    logp_base: float  # under the base at temperature 1
    kl: float  # Σ_t KL(π ‖ π_base), the base at temperature 1


class GuidedDecoder:
    """A frozen base steered by LoRA ARMs, many prompts and many weight vectors at once.

        decoder = GuidedDecoder(model, prompter, {"positivity": Path("models/arms/positivity")}, batch_size=64)
        for index, generation in decoder.generate(requests):
            print(requests[index].prompt, generation.text)

    Raises:
        UserError: an adapter is missing, damaged, not made for this base, or has another tokenizer.
    """

    def __init__(
        self, model: PreTrainedModel, prompter: Prompter, arms: Mapping[str, Path], batch_size: int = 64
    ) -> None:
        for name, folder in arms.items():
            if (folder / "tokenizer_config.json").is_file():
                check_vocabulary(prompter.tokenizer, Prompter.load(folder, prompter.template).tokenizer, name)
        self._lanes = Lanes(model, arms)
        self._arms = list(arms)
        self._prompter = prompter
        self._batch_size = batch_size
        self._device = model.device
        self._context = int(model.config.max_position_embeddings)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generation]]:
        """Yield (index into `requests`, generation) as rows finish.

        Raises:
            UserError: a request names an unknown ARM, or a prompt leaves no room in the context; nothing is
                generated then.
        """
        ids = [self._prompt_ids(request) for request in requests]
        for batch in self._planned(ids):
            yield from self._batch(batch, [requests[index] for index in batch], [ids[index] for index in batch])

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """The batches that `generate` would form, as indices into `requests`.

        What rows share a batch can decide a floating-point tie. Generating batch by batch of one plan, and keeping
        whole batches only, makes an interrupted run equal to an uninterrupted one.

        Raises:
            UserError: as `generate`.
        """
        return self._planned([self._prompt_ids(request) for request in requests])

    def _planned(self, ids: list[list[int]]) -> list[list[int]]:
        # Rows of one prompt stay together (its prefill is shared) and neighbours are of like length (little padding).
        order = sorted(range(len(ids)), key=lambda index: (len(ids[index]), ids[index], index))
        return [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]

    def _prompt_ids(self, request: Request) -> list[int]:
        for name in request.arms:
            if name not in self._arms:
                raise UserError(f"weights name {name}, but the ARMs are {', '.join(self._arms) or 'none'}.")
        ids = self._prompter.prompt_ids(request.prompt)
        if len(ids) + request.max_new_tokens > self._context:
            raise UserError(
                f"the prompt {request.prompt[:60]!r}… has {len(ids)} tokens and with {request.max_new_tokens} new ones "
                f"exceeds the base's context of {self._context}: shorten it or lower decoding.max_new_tokens."
            )
        return ids

    def _batch(
        self, indices: list[int], requests: list[Request], ids: list[list[int]]
    ) -> Iterator[tuple[int, Generation]]:
        unique = sorted({tuple(row) for row in ids})
        prompt_B = torch.tensor([unique.index(tuple(row)) for row in ids], device=self._device)
        ids_PT, mask_PT = left_pad([list(row) for row in unique], self._prompter.eos, self._device)
        alpha = {
            name: torch.tensor([request.arms.get(name, 0.0) for request in requests], device=self._device)
            for name in self._arms
        }
        rows = {BASE: torch.arange(len(requests), device=self._device)}
        rows |= {name: alpha_B.nonzero()[:, 0] for name, alpha_B in alpha.items()}
        self._lanes.prefill(ids_PT, mask_PT, prompt_B, rows)
        lengths = dict(zip(indices, map(len, ids), strict=True))
        batch = _Batch(indices, requests, alpha, self._device)
        while True:
            finished = batch.advance(self._lanes, self._prompter)
            for index, tokens, finish, sums in finished:
                yield index, Generation(self._prompter.text(tokens), lengths[index], tokens, finish, *sums)
            if not batch.indices:
                return
            self._lanes.step(batch.last_B)


def left_pad(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows padded on the left to one length, and the mask that is 1 on tokens: ids_PT, mask_PT."""
    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _Batch:
    """The rows still being generated, and what has been summed over their tokens."""

    def __init__(
        self, indices: list[int], requests: list[Request], alpha: dict[str, Tensor], device: torch.device
    ) -> None:
        self.indices = list(indices)
        self._alpha = alpha
        self._limit_B = torch.tensor([request.max_new_tokens for request in requests], device=device)
        self._temperature_B = torch.tensor([request.temperature for request in requests], device=device)
        longest = int(self._limit_B.max())
        streams = np.stack([random_stream(request.stream, longest) for request in requests])
        self._uniforms_BT = torch.from_numpy(streams).to(device)
        self._tokens_BT = torch.empty(len(requests), 0, dtype=torch.long, device=device)
        self._sums_B3 = torch.zeros(len(requests), 3, dtype=torch.float64, device=device)

    @property
    def last_B(self) -> Tensor:
        """The newest token of each row."""
        return self._tokens_BT[:, -1]

    def advance(self, lanes: Lanes, prompter: Prompter) -> list[tuple[int, list[int], str, tuple[float, float, float]]]:
        """Draw one token per row; drop the rows that end and return them."""
        base_logps_BV = token_logps(lanes.logits(BASE), prompter.vocab_size)
        arms = [
            (rows_b, self._alpha[name][rows_b], token_logps(lanes.logits(name), prompter.vocab_size))
            for name, rows_b in lanes.rows.items()
            if name != BASE
        ]
        logps_BV = guided_logps(base_logps_BV, arms, self._temperature_B)
        step = self._tokens_BT.shape[1]
        tokens_B = draw(logps_BV, self._uniforms_BT[:, step])
        drawn = tokens_B[:, None]
        self._sums_B3 += torch.stack(
            [
                logps_BV.gather(1, drawn)[:, 0],
                base_logps_BV.gather(1, drawn)[:, 0],
                kl_divergence(logps_BV, base_logps_BV),
            ],
            dim=1,
        )
        self._tokens_BT = torch.cat([self._tokens_BT, drawn], dim=1)
        ended_B = tokens_B == prompter.eos
        done_B = ended_B | (step + 1 >= self._limit_B)
        if not bool(done_B.any()):
            return []
        finished = [
            (
                self.indices[row],
                self._tokens_BT[row].tolist(),
                "eos" if ended_B[row] else "length",
                tuple(self._sums_B3[row].tolist()),
            )
            for row in done_B.nonzero()[:, 0].tolist()
        ]
        kept = (~done_B).nonzero()[:, 0]
        if len(kept):
            lanes.keep(kept, len(self.indices))
        self._keep(kept)
        return finished

    def _keep(self, kept: Tensor) -> None:
        self.indices = [self.indices[row] for row in kept.tolist()]
        self._alpha = {name: alpha_B[kept] for name, alpha_B in self._alpha.items()}
        self._limit_B, self._temperature_B = self._limit_B[kept], self._temperature_B[kept]
        self._uniforms_BT, self._tokens_BT = self._uniforms_BT[kept], self._tokens_BT[kept]
        self._sums_B3 = self._sums_B3[kept]
