"""The guided law as a model of EleutherAI's lm-evaluation-harness: what guidance costs on other people's benchmarks.

    python -m pipeline lm_eval --model_args positivity=0.5,conciseness=0.5 --tasks arc_easy --apply_chat_template
    python -m pipeline lm_eval --model_args base=smollm2-360m,form=log_ratio,positivity=1 --tasks gsm8k --limit 100

It is the harness's own command line, where `--model genarm` need not be said. `--model_args` names weights by
objective; none are the base alone. Weights and models are those of params.yaml, in the project's folder. ARMs have
learned on prompts in a chat template: with `--apply_chat_template` a task's questions stand in one.
"""

import sys
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.config.errors import UserError
from pipeline.config.load import load_params
from pipeline.config.points import REFERENCE, point_weights
from pipeline.config.schema import Point
from pipeline.config.workspace import Workspace
from pipeline.decoding.backbone import Backbone, plan_backbones
from pipeline.decoding.logits_processor import GuidanceLogitsProcessor
from pipeline.generation.model_set import ModelSet
from pipeline.models.loading import resolve_device
from pipeline.models.vocabulary import same_vocabulary

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
else:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError("lm-evaluation-harness is not installed: pip install 'genarm-pipeline[lm-eval]'.") from error

FORMS = ("plain", "log_ratio")


class GuidedLM(HFLM):
    """A base steered by ARMs, with the harness's batching, windows and templates around it.

    Log-likelihoods are those of the guided law at temperature 1; generation draws from it as the task says.

    Args:
        base: one of the project's models; None: the one that params.yaml steers.
        form: `plain` or `log_ratio`, as of a sweep's point.
        batch_size: requests at once.
        max_batch_size: the most that `batch_size=auto` tries.
        device: where it computes; None, or a GPU where there is none: `decoding.device`.
        how: α of each ARM by its objective's name, and further options of the harness's `hf` model (`max_length`, …).

    Raises:
        UserError: a name is unknown, a weight is not a number, a model or an ARM is missing, or an ARM has another
            tokenizer than the base.
    """

    def __init__(
        self,
        base: str | None = None,
        form: str = "plain",
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        device: str | None = None,
        **how: Any,
    ) -> None:
        params, workspace = load_params(), Workspace()
        base = base or params.base
        if base not in params.models:
            raise UserError(f"--model_args base={base}: params.yaml has no such model, but {', '.join(params.models)}.")
        if form not in FORMS:
            raise UserError(f"--model_args form={form}: use {' or '.join(FORMS)}.")
        alphas = {name: how.pop(name) for name in list(how) if name in params.objectives}
        for name, alpha in alphas.items():
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < float("inf"):
                raise UserError(f"--model_args {name}={alpha}: a weight is a finite number.")
        if unknown := set(how) - signature(HFLM.__init__).parameters.keys():
            raise UserError(
                f"--model_args names {sorted(unknown)[0]}: use base, form, options of the harness's hf model, or an "
                f"objective ({', '.join(params.objectives)})."
            )
        weights = point_weights(Point(alphas, form=form), params.arm.base == base)  # type: ignore[arg-type]
        models = ModelSet(params, workspace, base, {name for name, alpha in weights.items() if alpha})
        # The harness asks for a GPU unless told otherwise, whether there is one or not.
        absent = device is None or (device.startswith("cuda") and not torch.cuda.is_available())
        place = resolve_device(params.decoding.device if absent else str(device))
        prompter = models.strong.prompter()
        if models.weak is not None and not same_vocabulary(prompter.tokenizer, models.weak.prompter().tokenizer):
            raise UserError(
                f"--model_args base={base}: the ARMs have the tokenizer of {params.arm.base}, and the harness scores "
                "tokens of the base's: use a base of that tokenizer."
            )
        model = models.strong.load(place)
        adapters, beside = plan_backbones(models.strong, models.arms, models.weak, {}, REFERENCE in weights)
        backbones = [Backbone(model, prompter, adapters, name=None)] if adapters else []
        backbones += [side.load(place) for side in beside]
        self._prompter, self._weights, self._backbones = prompter, weights, backbones
        self._law = GuidanceLogitsProcessor(prompter, weights, *backbones)
        super().__init__(
            model, tokenizer=prompter.tokenizer, batch_size=batch_size, max_batch_size=max_batch_size, **how
        )

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """The guided law behind every token: logits_BTV."""
        with torch.inference_mode():
            return self._law.sequence_logits(inps, self.model(inps, use_cache=False).logits)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """What the harness's `hf` model generates, with guidance on its scores."""
        mask = generation_kwargs.get("attention_mask")
        law = GuidanceLogitsProcessor(self._prompter, self._weights, *self._backbones, attention_mask=mask)
        drawn: Tensor = super()._model_generate(context, max_length, stop, logits_processor=[law], **generation_kwargs)
        return drawn


def main(arguments: Sequence[str]) -> None:
    """Run the harness's command line with the guided law as its model."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    register_model("genarm")(GuidedLM)
    runs = arguments[0] not in ("ls", "validate") and "--model" not in arguments
    sys.argv = ["lm_eval", *arguments, *(["--model", "genarm"] if runs else [])]
    cli_evaluate()
