"""The sentences of contrast objectives in the prompt while decoding, and no training.

`instruction`: the base prompted with the wanted sentence. `contrast`: log π(·|x) + Σ α_i (log π(·|x, wanted_i) −
log π(·|x, unwanted_i)), as in context-aware decoding (arXiv 2305.14739) and context steering (CoS, arXiv 2405.01768).

Each sentence is a lane: the base again, on the same weights, with another prompt. So the law is one of `GuidedDecoder`,
and the KL is to the base at the bare prompt, as every other method's is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.errors import UserError
from pipeline.config.methods import Prompting
from pipeline.config.points import BASE
from pipeline.config.schema import Objective
from pipeline.data.contrast import instructed
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder
from pipeline.models.loading import Source, resolve_device
from pipeline.models.prompting import Prompter


@dataclass(frozen=True)
class InstructedPrompter(Prompter):
    """A prompter that puts an instruction into every prompt; None leaves prompts as they are."""

    instruction: str | None = None
    role: str = "user"  # whose turn it stands in, or `system`

    def prompt_ids(self, prompt: str, options: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of the prompt with the instruction, inside the template."""
        if self.instruction is not None:
            prompt = instructed(prompt, self.instruction, self.role)
        return super().prompt_ids(prompt, options)


def lane(objective: str, side: str) -> str:
    """The name of the base's lane under a sentence of an objective."""
    return f"prompt/{side}/{objective}"


def sentences_of(method: Prompting, objectives: Mapping[str, Objective]) -> dict[str, str | None]:
    """The sentence of every lane that the method needs.

    Raises:
        UserError: an objective has no sentence.
    """
    sentences: dict[str, str | None] = {}
    for name, objective in objectives.items():
        if objective.wanted is None:
            raise UserError(f"objectives.{name} has no sentence to prompt with: set objectives.{name}.wanted.")
        sentences[lane(name, "wanted")] = objective.wanted
        if method.form == "contrast":
            sentences[lane(name, "unwanted")] = objective.unwanted
    return sentences


def weights(method: Prompting, alphas: Mapping[str, float]) -> dict[str, float]:
    """The exponents of the law, by lane; several instructions share the base's place in proportion to their weights."""
    if method.form == "contrast":
        signs = {"wanted": 1.0, "unwanted": -1.0}
        return {lane(name, side): sign * alpha for name, alpha in alphas.items() for side, sign in signs.items()}
    return {BASE: 1.0 - sum(alphas.values()), **{lane(name, "wanted"): alpha for name, alpha in alphas.items()}}


def decoder(
    method: Prompting, source: Source, objectives: Mapping[str, Objective], device: str, batch_size: int
) -> GuidedDecoder:
    """A decoder of the base with a lane for every sentence, all on the weights that are loaded once."""
    model, prompter = source.load(resolve_device(device)), source.prompter()
    lanes = [
        Backbone(model, InstructedPrompter(prompter.tokenizer, prompter.template, sentence, method.role), name=name)
        for name, sentence in sentences_of(method, objectives).items()
    ]
    return GuidedDecoder(Backbone(model, prompter), *lanes, batch_size=batch_size)
