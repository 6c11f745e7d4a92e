"""The part of the playground that makes dials from two sentences, and what they are to the decoder."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from pipeline.config.errors import UserError
from pipeline.config.points import BASE
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.report.dial_process import DialProcess
from pipeline.report.dials import Dial, dial_params, dials_folder, finished_dials

MOST_DIALS = 6  # sliders that the page keeps for dials, shown once there is one


class DialMaker:
    """The dials of a project, and one in the making.

    Args:
        params: the experiment whose base they guide.
        workspace: where the models are.
    """

    def __init__(self, params: Params, workspace: Workspace) -> None:
        self._params, self._workspace, self._process = params, workspace, DialProcess()

    @property
    def dials(self) -> dict[str, Dial]:
        """The finished dials, by name; an objective of the experiment comes before a dial of its name."""
        return {dial.name: dial for dial in finished_dials(self._workspace) if dial.name not in self._params.objectives}

    def guides(self, base: str, weights: Iterable[str]) -> dict[str, Path]:
        """The folders of the dials among the names of what is to guide.

        Raises:
            UserError: a dial is of another model than the base.
        """
        chosen = {name: dial for name, dial in self.dials.items() if name in weights}
        for name, dial in chosen.items():
            if dial.base != base:
                raise UserError(f"the dial {name} was made of {dial.base}: choose that as the base, or leave it out.")
        return {name: dial.arm for name, dial in chosen.items()}

    def law(self, base: str, weights: Mapping[str, float]) -> dict[str, float]:
        """The exponents of what is sampled from: dials guide in the log-ratio form, so that α may be below zero."""
        dials = self.guides(base, weights)
        return {**weights, **({BASE: 1.0 - sum(weights[name] for name in dials)} if dials else {})}

    def make(self, name: str, wanted: str, unwanted: str) -> Iterator[str]:
        """Make a dial of two sentences, and say how far it is.

        Raises:
            UserError: the name is taken or none, the sentences are empty or equal, or the dial cannot be made.
        """
        if name in self._params.objectives:
            raise UserError(f"{name} is an objective of the experiment: name the dial otherwise.")
        if len(self.dials.keys() | {name}) > MOST_DIALS:
            raise UserError(f"there are {MOST_DIALS} dials: remove one below {dials_folder(self._workspace)} first.")
        dial_params(self._params, name, wanted, unwanted)
        yield from map(str, self._process.make(name, wanted, unwanted))
        if name in self.dials and not self._process.was_cancelled:
            dial = self.dials[name]
            yield f"finished in {dial.seconds:.0f} s, held-out accuracy {dial.accuracy:.2f}. {dial.verdict}"

    def cancel(self) -> None:
        """End the dial in the making."""
        self._process.cancel()


def slider_of(maker: DialMaker, place: int) -> dict[str, Any]:
    """What the slider of the dial at that place shows; it is hidden while there is none."""
    dials = list(maker.dials.values())
    if place >= len(dials):
        return {"label": "α", "value": 0.0, "visible": False}
    return {"label": f"α {dials[place].name}", "value": 0.5, "visible": True, "info": dials[place].wanted}


def panel(maker: DialMaker, arms: Sequence[str], controls: Sequence[Any]) -> None:
    """Two sentences and a button on the page.

    Args:
        maker: of the dials.
        arms: the ARMs that have sliders before those of the dials.
        controls: what a new dial changes: the check boxes, the tint, the sliders.
    """
    # Open: the fields of a closed one are mounted when it opens, and what is typed before they have settled is lost.
    with gr.Accordion("Make a dial from two sentences", open=True, elem_id="make-a-dial"):
        gr.Markdown(
            "Responses to a few dozen prompts are sampled under either sentence, and an ARM learns to tell them apart: "
            "minutes on two cores. The estimate of what is left stands beside the progress. A sentence tells the model "
            "how to answer; the second one is its opposite."
        )
        with gr.Row():
            name = gr.Textbox("politeness", label="Name", max_length=64, elem_id="dial-name")
            wanted = gr.Textbox("Answer politely and warmly.", label="Wanted", max_length=400, elem_id="dial-wanted")
            unwanted = gr.Textbox(
                "Answer rudely and curtly.", label="Unwanted", max_length=400, elem_id="dial-unwanted"
            )
        with gr.Row():
            make = gr.Button("Make a dial", variant="primary", elem_id="dial-make")
            cancel = gr.Button("Cancel", elem_id="dial-cancel")
        progress = gr.Markdown("", elem_id="dial-progress")

        def run(name: str, wanted: str, unwanted: str, used: Sequence[str]) -> Iterator[list[Any]]:
            unchanged = [gr.update() for _ in controls]
            try:
                for lines in maker.make(name.strip(), wanted, unwanted):
                    yield [lines, *unchanged]
            except UserError as error:
                raise gr.Error(str(error)) from error
            names = [*arms, *maker.dials]
            chosen = [one for one in names if one in used or one == name.strip()]
            sliders = [gr.update(**slider_of(maker, place)) for place in range(MOST_DIALS)]
            kept = [gr.update() for _ in arms]
            yield [gr.update(), gr.update(choices=names, value=chosen), gr.update(choices=names), *kept, *sliders]

        make.click(run, [name, wanted, unwanted, controls[0]], [progress, *controls], concurrency_id="dial")
        cancel.click(maker.cancel, None, None, queue=False)
