"""The batched guided decoder: requests in, generations out as rows finish."""

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.config.errors import UserError
from pipeline.config.points import BASE, REFERENCE
from pipeline.decoding.backbone import Backbone, load_backbones
from pipeline.decoding.batch import Batch, Row
from pipeline.decoding.cross_tokenizer.bridge import TokenizerBridge, common_vocabulary
from pipeline.decoding.cuda_graphs import lacks_memory
from pipeline.decoding.guidance import normalised
from pipeline.decoding.request import Generation, Request
from pipeline.decoding.speculation import DraftLength, SpeculativeBatch
from pipeline.decoding.trace import GUIDED, Trace
from pipeline.models.loading import Source, resolve_device
from pipeline.models.mixtures import lanes_of_weights
from pipeline.models.vocabulary import same_vocabulary

__all__ = ["Generation", "GuidedDecoder", "PartialGeneration", "Request", "Trace"]

_ROUNDS = 4  # batches' worth of rows that are planned together: see `GuidedDecoder.plan`
_EVICT_FRACTION = 8  # finished rows are let go once they are one in so many


@dataclass(frozen=True)
class PartialGeneration:
    """A response as far as it has come."""

    tokens: Sequence[int]
    texts: Sequence[str]  # what each token adds to the text
    rewards: Mapping[str, Sequence[float]]  # per ARM and token, log π_r − log π_base in nats
    generation: Generation | None  # once it has ended


class GuidedDecoder:
    """A frozen base steered by ARMs, many prompts and many weight vectors at once.

        base = Backbone(model, prompter, {"positivity": Path("models/arms/positivity")})
        for index, generation in GuidedDecoder(base).generate(requests):
            print(requests[index].prompt, generation.text)

    ARMs that are LoRA adapters of the base run with it in one forward; each of `others`, an ARM that is a model of its
    own or several on a backbone of theirs, is a further forward. Requests may name any of them, in any mix. ARMs that
    were trained as one for all mixes (PARM, UniARM) read a row as one lane, whatever their number. ARMs of
    another tokenizer come with the model that they were made from, as lane `reference`, and guide through
    `pipeline.decoding.cross_tokenizer`: each as if it were an ARM of the base, log π_base + log P_arm − log P_ref.

    Args:
        base: the backbone whose lane `base` is steered.
        others: backbones of further ARMs.
        batch_size: rows generated at once; halved once if memory does not suffice.
        num_speculative_tokens: tokens that the backbones of ARMs beside the base draft for it to read at once; None: as
            many as pay. Rows do not depend on it but for rounding. Without effect on ARMs that are adapters of the base
            and on those of another tokenizer.

    Raises:
        UserError: an ARM of another tokenizer comes without its reference, or one of the two tokenizers does not tell
            its bytes; two lanes have one name.
    """

    def __init__(
        self, base: Backbone, *others: Backbone, batch_size: int = 64, num_speculative_tokens: int | None = None
    ) -> None:
        self._backbones = [base, *others]
        if BASE not in base.lanes:
            raise UserError(f"the first backbone has no lane {BASE}: leave its name as it is.")
        self._vocab_size = common_vocabulary(base.prompter, self._backbones)
        other_vocabulary = [
            backbone for backbone in others if not same_vocabulary(base.prompter.tokenizer, backbone.prompter.tokenizer)
        ]
        self._bridge = None
        if other_vocabulary:
            self._bridge = TokenizerBridge(base.prompter, base.ends, other_vocabulary, self._vocab_size)
            names = ", ".join(lane for lane in self._bridge.lanes if lane != REFERENCE)
            warnings.warn(
                f"{names}: another tokenizer than the base's, so guidance is across tokenizers.", stacklevel=2
            )
        self._arms = [lane for backbone in self._backbones for lane in backbone.lanes if lane != BASE]
        self._mixtures = {lane: of for backbone in self._backbones for lane, of in backbone.mixtures.items()}
        self._batch_size = batch_size
        self._halved = False
        self._draft_length = DraftLength(num_speculative_tokens)

    @classmethod
    def load(
        cls,
        base: Path | Source,
        arms: Mapping[str, Path],
        *,
        arm_base: Path | Source | None = None,
        policies: Mapping[str, Path] | None = None,
        reference: bool = False,
        device: str = "auto",
        batch_size: int = 64,
        num_speculative_tokens: int | None = None,
    ) -> "GuidedDecoder":
        """A decoder from local folders.

        Args:
            base: the base; a folder alone is loaded in the dtype that `auto` resolves to and prompted by chat template.
            arms: folder of each ARM; one with a config.json is a model of its own, the others are PEFT adapters.
            arm_base: what the ARMs were made from, where that is not the base: adapters run on it, whole models are
                loaded and prompted as it is.
            policies: adapters of the base itself beside ARMs of another model; with ARMs of the base, name them there.
            reference: where the ARMs are whole models, load `arm_base` beside them as lane `reference`, for the
                log-ratio form; beside adapters of it, it is one anyway.
            device: as `decoding.device` in the configuration.
            batch_size: rows generated at once.
            num_speculative_tokens: as for the decoder itself.

        Raises:
            UserError: a folder is missing or unreadable, or an ARM does not fit the base.
        """
        place = resolve_device(device)
        strong = base if isinstance(base, Source) else Source(base)
        weak = Source(arm_base) if isinstance(arm_base, Path) else arm_base
        across = weak is not None and not same_vocabulary(strong.prompter().tokenizer, weak.prompter().tokenizer)
        backbones = load_backbones(strong, arms, weak, policies or {}, reference or across, place)
        return cls(*backbones, batch_size=batch_size, num_speculative_tokens=num_speculative_tokens)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], progress: str | None = None) -> Iterator[tuple[int, Generation]]:
        """Yield (index into `requests`, generation) as rows finish, under a progress bar called `progress`.

        Raises:
            UserError: a request names an unknown ARM or a prompt leaves no room in a context (nothing is generated
                then); a model gave logits that are not finite; memory does not suffice for half the batch either.
        """
        rows = self._rows(requests)
        with tqdm(total=len(rows), desc=progress, unit="row", smoothing=0.05, disable=progress is None) as bar:
            for chunk in self._planned(rows):
                for index, generation in self._chunk(chunk):
                    bar.update()
                    yield index, generation

    @torch.inference_mode()
    def stream(self, requests: Sequence[Request]) -> Iterator[list[PartialGeneration]]:
        """Yield all responses as they grow, a token of each at a time, with the rewards of all ARMs that are named.

        An ARM at weight 0 does not guide, but it reads. All requests are one batch, whatever its size.

        Raises:
            UserError: as `generate`.
        """
        rows = [replace(row, probed_arms=frozenset(row.request.weights) - {BASE}) for row in self._named(requests)]
        ended: dict[int, Generation] = {}
        pieces = self._backbones[0].prompter.pieces
        with self._batch() as batch:
            batch.admit_rows(rows)
            while batch.alive:
                ended |= {row.index: generation for row, generation in batch.step()}
                yield [
                    PartialGeneration(
                        tuple(row.tokens),
                        pieces(row.tokens),
                        {name: tuple(rewards) for name, rewards in row.rewards.items()},
                        ended.get(row.index),
                    )
                    for row in rows
                ]

    def trace(self, request: Request, tokens: Sequence[int]) -> Trace:
        """Log-probabilities of each token of a response to the request's prompt, by base, ARMs and guided law.

        Args:
            request: the prompt at a point; ARMs that it weighs with 0 read it as well.
            tokens: the response, by the base's tokenizer; a generation's `tokens` are one.

        Raises:
            UserError: as `generate`; or there is no token.
        """
        return self.traces([request], [tokens])[0]

    @torch.inference_mode()
    def traces(self, requests: Sequence[Request], responses: Sequence[Sequence[int]]) -> list[Trace]:
        """The traces of several responses, read together; all their laws are held at once.

        Raises:
            UserError: as `trace`.
        """
        if not all(responses):
            raise UserError("an empty response has no tokens to explain: give it a text.")
        sizes = map(len, responses)
        limited = [replace(request, max_new_tokens=size) for request, size in zip(requests, sizes, strict=True)]
        laws: list[dict[str, list[torch.Tensor]]] = [{} for _ in limited]
        named = {BASE, *(name for request in requests for name in request.weights)}
        proposed: list[torch.Tensor] = []
        # With drafts, so that what is proposed is told; nothing is generated.
        length = self._draft_length if self._draft_length.fixed == 0 else DraftLength(1)
        with self._batch(length) as batch:
            batch.admit_rows(
                [replace(row, probed_arms=frozenset(row.request.weights) - {BASE}) for row in self._named(limited)]
            )
            for step in range(max(map(len, responses))):
                guided_BV, base_BV, arms = batch.read()
                everywhere = torch.arange(len(limited), device=base_BV.device)
                lane_logits = {BASE: (everywhere, base_BV)}
                lane_logits |= {name: (at, values) for name, (at, _, values) in arms.items() if name in named}
                lane_logits = {name: (at, normalised(values)) for name, (at, values) in lane_logits.items()}
                if isinstance(batch, SpeculativeBatch) and batch.drafts:
                    proposed.append(batch.proposals(arms, step).cpu())
                for name, (at, logps_BV) in {**lane_logits, GUIDED: (everywhere, guided_BV)}.items():
                    for place, row in enumerate(at.tolist()):
                        if step < len(responses[row]):
                            laws[row].setdefault(name, []).append(logps_BV[place].cpu())
                batch.append(torch.tensor([tokens[min(step, len(tokens) - 1)] for tokens in responses]))
        spell = self._backbones[0].prompter
        proposals = torch.stack(proposed, dim=1).tolist() if proposed else [None] * len(limited)
        return [
            Trace(
                one, list(tokens), {name: torch.stack(parts) for name, parts in logps_by_law.items()}, spell,
                proposal and proposal[: len(tokens)],
            )
            for one, tokens, logps_by_law, proposal in zip(limited, responses, laws, proposals, strict=True)
        ]  # fmt: skip

    def response_ids(self, prompt: str, response: str, ended: bool = True) -> list[int]:
        """The tokens of a text as a response to a prompt; end-of-sequence included, if it ended."""
        return self._backbones[0].prompter.response_ids(prompt, response, ended)

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """The chunks that `generate` works off one after the other, as indices into `requests`.

        Inside a chunk rows take the places of rows that ended. Which rows share a batch can decide a floating-point
        tie. If only whole chunks are stored, an interrupted run therefore equals an uninterrupted one, unless memory
        ran out and halved the batch.

        Raises:
            UserError: as `generate`.
        """
        rows = self._rows(requests)
        return [[row.index for row in chunk] for chunk in self._planned(rows)]

    def _planned(self, rows: list[Row]) -> list[list[Row]]:
        # Rows of one prompt stay together (it is read once) and neighbours are of like length (little padding).
        order, size = sorted(rows, key=lambda row: (len(row.ids), row.ids, row.index)), self._batch_size * _ROUNDS
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _rows(self, requests: Sequence[Request]) -> list[Row]:
        """The requests with their prompts as every backbone reads them; each distinct prompt is tokenised once."""
        read = {
            prompt: tuple(tuple(backbone.prompter.prompt_ids(prompt)) for backbone in self._backbones)
            for prompt in dict.fromkeys(request.prompt for request in requests)
        }
        for request in requests:
            for name in request.arms:
                if name not in self._arms:
                    raise UserError(f"weights name {name}, but the ARMs are {', '.join(self._arms) or 'none'}.")
            for backbone, ids in zip(self._backbones, read[request.prompt], strict=True):
                if len(ids) + request.max_new_tokens > backbone.context:
                    raise UserError(
                        f"the prompt {request.prompt[:60]!r}… has {len(ids)} tokens and with {request.max_new_tokens} "
                        f"new ones exceeds the context of {backbone.context} of {', '.join(backbone.lanes)}: shorten "
                        "it or lower decoding.max_new_tokens."
                    )
        return [
            Row(index, request, read[request.prompt], lanes_of_weights(request.arms, self._mixtures))
            for index, request in enumerate(requests)
        ]

    def _named(self, requests: Sequence[Request]) -> list[Row]:
        """The rows of requests whose ARMs must all be there, at weight 0 as well."""
        self._rows([replace(request, weights=dict.fromkeys(request.weights, 1.0)) for request in requests])
        return self._rows(requests)

    def _chunk(self, rows: list[Row]) -> Iterator[tuple[int, Generation]]:
        """Generate rows; where memory does not suffice, begin those not yet finished again in half the batch."""
        left = {row.index: row for row in rows}
        while left:
            try:
                for row, generation in self._run(list(left.values())):
                    del left[row.index]
                    yield row.index, generation
            except (MemoryError, RuntimeError) as error:
                if not lacks_memory(error):
                    raise
                if self._halved or self._batch_size == 1:
                    raise UserError(
                        f"memory does not suffice for a batch of {self._batch_size} rows: lower decoding.batch_size."
                    ) from error
                self._halved, self._batch_size = True, self._batch_size // 2
                warnings.warn(
                    f"out of memory: going on with half the batch, {self._batch_size} rows; "
                    "set decoding.batch_size to that.",
                    stacklevel=2,
                )
                left = {index: Row(index, row.request, row.prompts, row.arms) for index, row in left.items()}

    def _run(self, rows: list[Row]) -> Iterator[tuple[Row, Generation]]:
        """Generate rows, as many at once as the batch holds: waiting ones take the places of those that ended."""
        # Pieces of prompts: small enough to find room soon, large enough to share the reading of their prompt.
        piece = max(1, self._batch_size // _EVICT_FRACTION)
        waiting = deque(
            group[start : start + piece]
            for _, of_prompt in groupby(rows, key=lambda row: row.prompts)
            for group in [list(of_prompt)]
            for start in range(0, len(group), piece)
        )
        with self._batch() as batch:
            while True:
                gone = len(batch.rows) - batch.alive
                if not batch.alive or gone >= max(1, len(batch.rows) // _EVICT_FRACTION):
                    newcomers: list[Row] = []
                    while waiting and batch.alive + len(newcomers) + len(waiting[0]) <= self._batch_size:
                        newcomers += waiting.popleft()
                    if not batch.alive and not newcomers:
                        return
                    batch.admit_rows(newcomers)
                yield from batch.step()

    @contextmanager
    def _batch(self, length: DraftLength | None = None) -> Iterator[Batch]:
        """A batch whose sessions the next one may take over, unless an error left them half-way."""
        batch = self._new_batch(length or self._draft_length)
        try:
            yield batch
        except Exception:
            for backbone in self._backbones:
                backbone.idle.clear()  # and what they hold, should memory have run out
            raise
        except GeneratorExit:  # the caller stopped iterating
            batch.release()
            raise
        batch.release()

    def _new_batch(self, length: DraftLength) -> Batch:
        if self._bridge is None and len(self._backbones) > 1 and length.fixed != 0:
            return SpeculativeBatch(self._backbones, self._vocab_size, length)
        return Batch(self._backbones, self._vocab_size, self._bridge)
