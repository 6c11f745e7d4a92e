"""The panel of the playground that finds weights for an outcome, as `python -m pipeline choose` does."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from pipeline.config.errors import UserError
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.judges.session import open_judge
from pipeline.evaluation.targets import WORST, Target
from pipeline.generation.targets import Choice, TargetSearch

LEAST_KL = "least KL"  # in the list of what can be maximised: nothing, at as little KL as possible
_PROGRESS = gr.Progress(track_tqdm=True)  # shows the progress bars of what runs
SAMPLES, POINTS = 1, 4  # responses to a validation prompt; further weight vectors that a target may measure


class TargetChooser:
    """Finds weights; what it has measured once serves every further target.

    Args:
        params: the experiment.
        workspace: where models, pairs and stores are.
        release: frees the memory of models that others hold, before any is loaded.
    """

    def __init__(self, params: Params, workspace: Workspace, release: Callable[[], None]) -> None:
        self._params, self._workspace, self._release = params, workspace, release
        self._search: TargetSearch | None = None

    def choose(self, at_least: Mapping[str, float | None], maximise: str, kl: float | None) -> Choice:
        """The weights for a target.

        Args:
            at_least: the least mean reward of an objective; None: any.
            maximise: an objective, the lowest reward of all, or `LEAST_KL`.
            kl: the largest mean KL to the base, nats per response; None: any.

        Raises:
            UserError: the target bounds nothing, or there is no validation prompt.
        """
        bounds = {name: bound for name, bound in at_least.items() if bound is not None}
        target = Target(bounds, None if maximise == LEAST_KL else maximise, kl)
        target.check(list(self._params.objectives))
        self._release()
        if self._search is None:
            resources = Resources(self._params.models, self._workspace, self._params.decoding.device)
            judge = open_judge(self._params.judge, self._params.objectives, resources)
            self._search = TargetSearch(self._params, self._workspace, judge, SAMPLES)
        return self._search.choose(target, POINTS)


def panel(chooser: TargetChooser, arms: Sequence[str], sliders: Sequence[Any]) -> None:
    """Bounds, a button, what the weights promise; the sliders of the ARMs follow.

    Args:
        chooser: of the weights.
        arms: the objectives, each with a slider.
        sliders: those, in the same order.
    """
    # Open: the fields of a closed one are mounted when it opens, and what is typed before they have settled is lost.
    with gr.Accordion("Weights for an outcome", open=True, elem_id="outcome"):
        gr.Markdown(
            "Say what responses should earn on average; an empty field bounds nothing. Weights are measured on the "
            "validation prompts: minutes on two cores the first time, then only where a target needs more of them."
        )
        with gr.Row():
            # Texts: a field for numbers says 0 where it is empty.
            bounds = [
                gr.Textbox("", label=f"{name}, at least", max_length=20, elem_id=f"least-{name}") for name in arms
            ]
            kl = gr.Textbox("", label="KL, at most (nats)", max_length=20, elem_id="most-kl")
            choices: list[Any] = [LEAST_KL, *arms, ("lowest reward", WORST)]
            maximise = gr.Dropdown(choices, value=LEAST_KL, label="The best", elem_id="maximise")
        choose = gr.Button("Choose the weights", variant="primary", elem_id="choose")
        promise = gr.Markdown("", elem_id="promise")

        def run(maximise: str, kl: str, *bounds: str, progress: gr.Progress = _PROGRESS) -> list[Any]:
            try:
                numbers = {name: _number(bound) for name, bound in zip(arms, bounds, strict=True)}
                choice = chooser.choose(numbers, maximise, _number(kl))
            except UserError as error:
                raise gr.Error(str(error)) from error
            return [_promised(choice), *(gr.update(value=round(choice.weights[name], 2)) for name in arms)]

        choose.click(run, [maximise, kl, *bounds], [promise, *sliders], concurrency_id="dial")


def _number(text: str) -> float | None:
    """A field's number; None of an empty one."""
    try:
        return float(text) if text.strip() else None
    except ValueError as error:
        raise UserError(f"{text.strip()} is not a number: write one, such as 0.8, or leave the field empty.") from error


def _promised(choice: Choice) -> str:
    """What the weights promise, in a sentence."""
    rewards = [f"{name} {mean:.2f} [{low:.2f}, {high:.2f}]" for name, (mean, low, high) in choice.rewards.items()]
    mean, low, high = choice.kl
    reach = "" if choice.shortfall == 0 else "Not attainable by weights like these; the nearest is: "
    return f"{reach}{', '.join(rewards)}, KL {mean:.1f} [{low:.1f}, {high:.1f}] nats, on validation prompts."
