"""Guided decoding inside `model.generate` of transformers.

Shapes: B rows, T tokens so far, V entries of the base's head.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from pipeline.config.errors import UserError
from pipeline.config.points import BASE
from pipeline.decoding.backbone import Backbone, plan_backbones
from pipeline.decoding.cross_tokenizer.bridge import TokenizerBridge, common_vocabulary
from pipeline.decoding.cross_tokenizer.session import CrossTokenizerSession
from pipeline.decoding.guidance import cut, guided_logps
from pipeline.decoding.kv_cache import BackboneSession, blocks_of
from pipeline.decoding.static_cache import StaticSession, lanes_of
from pipeline.models.loading import Source
from pipeline.models.mixtures import lanes_of_weights
from pipeline.models.prompting import Prompter, ends_of
from pipeline.models.vocabulary import same_vocabulary


class GuidanceLogitsProcessor(LogitsProcessor):
    """Adds the ARMs to the base's scores: log π_base + Σ_i α_i log π_r,i − log Z (GenARM, guided decoding).

        arms = {"positivity": Path("models/arms/positivity")}
        guidance = GuidanceLogitsProcessor.load(model, Path("models/smollm2-135m"), arms, {"positivity": 1.0})
        model.generate(**inputs, do_sample=True, logits_processor=[guidance])

    Temperature, top-k, top-p and min-p of `generate` come after it and act on the guided law. It keeps the ARMs' caches
    from token to token, and starts anew when another prompt comes. Rows may be padded on the left and repeated
    (`num_return_sequences`). ARMs read the prompt as the base does; one with a template of its own needs
    `GuidedDecoder`, which is also the faster of the two: here base and ARMs are two forwards. ARMs of another tokenizer
    cannot read the base's prompt and need its text: `prompts`.

    Args:
        prompter: the base's.
        weights: α of each ARM; `base` is the exponent of the base itself, 1 unless named.
        backbones: what the ARMs run on; the base itself with `name=None` for adapters of the base.
        attention_mask: the prompts' [B, T]. Left out, the tokenizer's pad token marks padding.
        prompts: their texts, for ARMs of another tokenizer, which have their own template.

    Raises:
        UserError: an ARM is on no backbone, or has another tokenizer and no reference or no prompts; in `generate`,
            beam search, a token that an ARM does not know, or several rows where nothing tells what is padding.
    """

    def __init__(
        self,
        prompter: Prompter,
        weights: Mapping[str, float],
        *backbones: Backbone,
        attention_mask: Tensor | None = None,
        prompts: Sequence[str] = (),
    ) -> None:
        lanes = [lane for backbone in backbones for lane in backbone.lanes]
        for name in weights:
            if name not in (*lanes, BASE):
                raise UserError(f"weights name {name}, but the ARMs are {', '.join(lanes) or 'none'}.")
        self._base_weight = weights.get(BASE, 1.0)
        mixtures = {lane: of for backbone in backbones for lane, of in backbone.mixtures.items()}
        named = {name: alpha for name, alpha in weights.items() if alpha != 0.0 and name != BASE}
        self._weights = lanes_of_weights(named, mixtures)
        self._vocab_size = common_vocabulary(prompter, backbones)
        home = [backbone for backbone in backbones if same_vocabulary(prompter.tokenizer, backbone.prompter.tokenizer)]
        self._backbones = [backbone for backbone in home if backbone.own(self._weights)]
        self._other_vocabulary = [one for one in backbones if one not in home]
        self._bridge = None
        if self._other_vocabulary:
            if not prompts:
                raise UserError(
                    "ARMs of another tokenizer cannot read the base's prompts: give their texts, `prompts`."
                )
            self._bridge = TokenizerBridge(prompter, ends_of(prompter, None), self._other_vocabulary, self._vocab_size)
        self._prompts = [[one.prompter.prompt_ids(prompt) for one in self._other_vocabulary] for prompt in prompts]
        self._lanes: list[BackboneSession | StaticSession] = []
        self._across: CrossTokenizerSession | None = None
        self._mask, self._pad = attention_mask, prompter.tokenizer.pad_token_id
        # A prompt may begin with the very token that also pads.
        self._begins_with_pad = self._pad is not None and prompter.prompt_ids("a")[0] == self._pad
        self._seen_BT: Tensor | None = None

    @classmethod
    def load(
        cls,
        model: PreTrainedModel,
        folder: Path,
        arms: Mapping[str, Path],
        weights: Mapping[str, float],
        *,
        template: str | None = None,
        attention_mask: Tensor | None = None,
    ) -> "GuidanceLogitsProcessor":
        """A processor for ARMs in folders: adapters of the model, or models of its vocabulary.

        Args:
            model: the base, whose `generate` the processor goes into; adapters share its weights.
            folder: where the base came from, for its tokenizer.
            arms: the folder of each ARM.
            weights: as for the processor itself.
            template: text with {prompt}, as the ARMs were trained on; None: the tokenizer's chat template.
            attention_mask: as for the processor itself.

        Raises:
            UserError: as the processor itself; or a folder is missing, damaged, or not made for this model.
        """
        source = Source(folder, template)
        prompter = source.prompter()
        adapters, side_backbones = plan_backbones(source, arms, None, {}, reference=False)
        backbones = [Backbone(model, prompter, adapters, name=None)] if adapters else []
        backbones += [side.load(model.device) for side in side_backbones]
        return cls(prompter, weights, *backbones, attention_mask=attention_mask)

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The guided log-probabilities at temperature 1, −inf beyond the vocabulary: scores_BV."""
        if not self._continues(input_ids):
            self._begin(input_ids)
        self._seen_BT = input_ids.clone()
        arms = []
        for lanes in self._lanes:
            lanes.step(input_ids[:, -1:])
            for lane, rows_b in lanes.rows.items():
                logits_bV = cut(lanes.logits(lane), self._vocab_size).to(scores.device)
                alpha_b = torch.full((len(rows_b),), self._weights[lane], device=scores.device)
                arms.append((rows_b.to(scores.device), alpha_b, logits_bV))
        ones_B = torch.ones(len(scores), device=scores.device)
        logps = guided_logps(cut(scores, self._vocab_size), arms, ones_B, ones_B * self._base_weight)
        if self._across is not None and self._across.rows:
            self._across.step(input_ids[:, -1], [True] * len(input_ids))
            answers = self._across.ask(cut(scores, self._vocab_size), self._weights)
            alphas = {lane: ones_B[self._across.rows[lane]] * self._weights[lane] for lane in answers.values}
            logps = answers.guided(logps, alphas)
        return F.pad(logps, (0, scores.shape[-1] - self._vocab_size), value=-torch.inf)

    @torch.inference_mode()
    def sequence_logits(self, ids_BT: Tensor, logits_BTV: Tensor) -> Tensor:
        """The guided law behind every token of whole sequences, each ARM read in one forward: logits_BTV, in float32.

        They are not normalised: a softmax over V makes the law of them.

        Args:
            ids_BT: the sequences, padded on the right with anything.
            logits_BTV: what the base says of them.

        Raises:
            UserError: an ARM has another tokenizer, or a sequence a token that an ARM does not know.
        """
        if self._bridge is not None:
            raise UserError("ARMs of another tokenizer guide token by token only: generate, or use GuidedDecoder.")
        if int(ids_BT.max()) >= self._vocab_size:
            raise UserError("a text holds a special token that not all models know: leave it out.")
        total_BTV = logits_BTV.float() * self._base_weight
        for backbone in self._backbones:
            for lane in backbone.own(self._weights):
                backbone.adapted.serve(blocks_of([lane] * len(ids_BT)), step=False)
                lane_BTV = backbone.adapted.model(ids_BT.to(backbone.device), use_cache=False).logits
                kept_BTV = cut(total_BTV, self._vocab_size)
                kept_BTV.add_(cut(lane_BTV, self._vocab_size).to(total_BTV.device), alpha=self._weights[lane])
        total_BTV[..., self._vocab_size :] = -torch.inf
        return total_BTV

    def _continues(self, ids_BT: Tensor) -> bool:
        """Whether these rows are those of the last call, one token longer."""
        seen = self._seen_BT
        if seen is None or ids_BT.shape != (len(seen), seen.shape[1] + 1) or ids_BT.device != seen.device:
            return False
        before = ids_BT[:, :-1]
        if torch.equal(before, seen):
            return True
        if {tuple(row) for row in before.tolist()} <= {tuple(row) for row in seen.tolist()}:
            raise UserError("beam search moves rows, which guidance cannot follow: generate with num_beams=1.")
        return False

    def _begin(self, ids_BT: Tensor) -> None:
        rows = [row[start:] for row, start in zip(ids_BT.tolist(), self._starts(ids_BT), strict=True)]
        if max(map(max, rows)) >= self._vocab_size:
            raise UserError("a prompt holds a special token that not all models know: leave it out.")
        prompts = [list(prompt) for prompt in sorted(set(map(tuple, rows)))]
        served = [(prompts.index(row), self._weights.keys()) for row in rows]
        self._lanes = [lanes_of(backbone) for backbone in self._backbones]
        for lanes in self._lanes:
            lanes.admit_rows([], prompts, served)
        if self._bridge is not None:
            repeats = len(rows) // len(self._prompts)
            repeated = [prompt for prompt in self._prompts for _ in range(repeats)]
            self._across = CrossTokenizerSession(self._bridge, ids_BT.device)
            self._across.admit_rows([], repeated, [self._weights.keys()] * len(rows))

    def _starts(self, ids_BT: Tensor) -> list[int]:
        """Where each row's padding ends."""
        if self._mask is not None and ids_BT.shape[1] == self._mask.shape[1]:
            repeats = len(ids_BT) // len(self._mask)
            return [int(row.argmax()) for row in self._mask.int().repeat_interleave(repeats, dim=0)]
        if self._pad is None:
            if len(ids_BT) > 1:
                raise UserError("the tokenizer has no pad token: give the processor the prompts' attention_mask.")
            return [0]
        starts = [next((at for at, token in enumerate(row) if token != self._pad), len(row)) for row in ids_BT.tolist()]
        return [max(start - 1, 0) if self._begins_with_pad or start == ids_BT.shape[1] else start for start in starts]
