"""A local page: type a prompt, move a slider per objective, read the base beside the guided text; make a dial.

    python -m pipeline.report.playground --port 7860      # what `make playground` runs

The models are those of params.yaml that are below models/. Everything stays on this machine: the page listens on
loopback alone, asks nobody for anything and counts nothing.
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from pipeline.config.errors import UserError
from pipeline.config.load import load_params
from pipeline.config.points import BASE
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.decoding.decoder import Draft, GuidedDecoder, Request
from pipeline.decoding.token_colours import coloured
from pipeline.generation.model_set import ModelSet
from pipeline.report.dial_process import DialProcess
from pipeline.report.dials import Dial, dial_params, finished_dials

LONGEST_PROMPT, MOST_TOKENS, QUEUE = 4000, 512, 8
MOST_DIALS = 6  # sliders that the page keeps for dials, shown once there is one
_CODE = """from pathlib import PosixPath

from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace
from pipeline.decoding.request import Request
from pipeline.generation.model_set import ModelSet

dials = {dials!r}
models = ModelSet(load_params(), Workspace(), {base!r}, {arms!r}, dials)  # in the project's folder
prompt = {prompt!r}
how = {how!r}
control, guided = Request(prompt, {off!r}, **how), Request(prompt, {weights!r}, **how)
*_, (plain, steered) = models.decoder({device!r}, 2).stream([control, guided])
print("base:  ", plain.generation.text)
print("guided:", steered.generation.text)
"""
_FONTS = ["system-ui", "sans-serif"]  # gradio's own would be asked of a server far away


class Playground:
    """What the page shows: the models at hand, and what they write.

    Args:
        params: the experiment whose models and decoding are offered.
        workspace: where the models are.

    Raises:
        UserError: no base or no ARM is there yet.
    """

    def __init__(self, params: Params, workspace: Workspace) -> None:
        self.params, self._workspace = params, workspace
        here = [name for name in params.models if (workspace.model(name) / "config.json").is_file()]
        self.bases = sorted(here, key=lambda name: name != params.base)
        self.arms = [
            name
            for name in params.objectives
            if any((workspace.arm(name) / file).is_file() for file in ("adapter_config.json", "config.json"))
        ]
        if not self.bases or not (self.arms or self.dials):
            raise UserError(f"there is no base or no ARM below {workspace.models} yet: run `make repro` first.")
        self.making = DialProcess()
        self._loaded = lru_cache(maxsize=1)(self._load)  # one base at a time; weights are no part of it

    @property
    def dials(self) -> dict[str, Dial]:
        """The finished dials, by name; an objective of the experiment comes before a dial of its name."""
        return {dial.name: dial for dial in finished_dials(self._workspace) if dial.name not in self.params.objectives}

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

    def _load(self, base: str, arms: tuple[str, ...], dials: tuple[tuple[str, Path, float], ...]) -> GuidedDecoder:
        folders = {name: folder for name, folder, _ in dials}
        return ModelSet(self.params, self._workspace, base, arms, folders).decoder(self.params.decoding.device, 2)

    def make(self, name: str, wanted: str, unwanted: str) -> Iterator[str]:
        """Make a dial of two sentences, and say how far it is.

        Raises:
            UserError: the name is taken or none, the sentences are empty or equal, or the dial cannot be made.
        """
        if name in self.params.objectives:
            raise UserError(f"{name} is an objective of the experiment: name the dial otherwise.")
        if len(self.dials.keys() | {name}) > MOST_DIALS:
            raise UserError(f"there are {MOST_DIALS} dials: remove one below {self._workspace.scratch}/dials first.")
        dial_params(self.params, name, wanted, unwanted)
        yield from map(str, self.making.make(name, wanted, unwanted))
        if name in self.dials and not self.making.was_cancelled:
            dial = self.dials[name]
            yield f"finished in {dial.seconds:.0f} s, held-out accuracy {dial.accuracy:.2f}. {dial.verdict}"

    def write(self, base: str, prompt: str, weights: Mapping[str, float], **how: float) -> Iterator[list[Draft]]:
        """The base's and the guided response as they grow.

        Args:
            base: one of `bases`.
            prompt: what is asked.
            weights: α of each ARM that is to be loaded; at 0 it does not guide, but shows its rewards.
            how: temperature, max_new_tokens and seed.

        Raises:
            UserError: there is nothing to answer, something is out of its bounds, or the models do not fit.
        """
        if not prompt.strip() or len(prompt) > LONGEST_PROMPT:
            raise UserError(f"write a prompt of 1 to {LONGEST_PROMPT} characters.")
        if not 1 <= how["max_new_tokens"] <= MOST_TOKENS:
            raise UserError(f"a response may have 1 to {MOST_TOKENS} tokens.")
        dials, law = self.guides(base, weights), self.law(base, weights)
        asked = [Request(prompt, alphas, **how) for alphas in (dict.fromkeys(weights, 0.0), law)]  # type: ignore[arg-type]
        # A dial that was made anew lies in the same folder: its file's time tells the two apart.
        loaded = tuple((name, folder, (folder.parent / "dial.json").stat().st_mtime) for name, folder in dials.items())
        yield from self._loaded(base, tuple(weights), loaded).stream(asked)

    def code(self, base: str, prompt: str, weights: Mapping[str, float], **how: float) -> str:
        """The Python that writes the same two responses."""
        return _CODE.format(
            base=base, arms=list(weights), dials=self.guides(base, weights), prompt=prompt,
            weights=self.law(base, weights), off=dict.fromkeys(weights, 0.0), how=how,
            device=self.params.decoding.device,
        )  # fmt: skip


def shown(draft: Draft, arm: str) -> str:
    """A response in the colours of an ARM, as HTML."""
    facts = [f"{name} {sum(rewards):+.1f} nats" for name, rewards in draft.rewards.items()]
    if draft.generation is not None:
        facts.append(f"KL to the base {draft.generation.kl:.1f} nats, {len(draft.tokens)} tokens")
    return coloured(draft.texts, draft.rewards[arm]) + f"<small>{' · '.join(facts)}</small>"


def page(playground: Playground) -> gr.Blocks:
    """The page, not yet served."""
    arms, decoding = playground.arms, playground.params.decoding
    names = [*arms, *playground.dials]
    with gr.Blocks(title="Guided decoding", analytics_enabled=False) as blocks:
        gr.Markdown("## A frozen model, steered by reward models as you move the sliders")
        with gr.Row():
            base = gr.Dropdown(playground.bases, value=playground.bases[0], label="Base")
            used = gr.CheckboxGroup(names, value=names, label="Reward models (ARMs) to load", elem_id="used")
            tint = gr.Radio(names, value=names[0], label="Colours by")
        with gr.Row():
            sliders = [
                gr.Slider(
                    -1.0, 2.0, value=round(1 / len(names), 2), step=0.05, label=f"α {name}", elem_id=f"alpha-{name}"
                )
                for name in arms
            ]
            for place in range(MOST_DIALS):
                sliders.append(
                    gr.Slider(-1.0, 2.0, step=0.05, elem_id=f"alpha-dial-{place}", **_dial_slider(playground, place))
                )
        prompt = gr.Textbox(
            "Describe a rainy Monday morning.", label="Prompt", lines=2, max_length=LONGEST_PROMPT, elem_id="prompt"
        )
        with gr.Row():
            temperature = gr.Slider(0.0, 2.0, value=decoding.temperature, step=0.05, label="Temperature of the sum")
            length = gr.Slider(
                1, MOST_TOKENS, value=min(decoding.max_new_tokens, MOST_TOKENS), step=1, label="Tokens at most"
            )
            seed = gr.Number(playground.params.seed, precision=0, label="Seed")
        with gr.Row():
            go = gr.Button("Write", variant="primary", elem_id="write")
            stop = gr.Button("Stop")
        with gr.Row():
            with gr.Column():
                gr.Markdown("### The base alone")
                control = gr.HTML(elem_id="control")
            with gr.Column():
                gr.Markdown("### Guided")
                guided = gr.HTML(elem_id="guided")
        gr.Markdown("Blue: the ARM wants the token more than the base does; orange: less. Rest the mouse on a token.")
        with gr.Accordion("The Python that reproduces this", open=False, elem_id="reproduce"):
            code = gr.Code(language="python", elem_id="code", interactive=False)
            copied = gr.Button("Copy the Python", elem_id="copy")

        def run(
            base: str, used: Sequence[str], tint: str, prompt: str, temperature: float, length: float, seed: float,
            *alphas: float,
        ) -> Iterator[tuple[str, str, str]]:  # fmt: skip
            shown_names = [*arms, *playground.dials]
            weights = {name: alpha for name, alpha in zip(shown_names, alphas, strict=False) if name in used}
            how = {"temperature": float(temperature), "max_new_tokens": int(length), "seed": int(seed)}
            if not weights:
                raise gr.Error("Choose at least one reward model.")
            again = playground.code(base, prompt, weights, **how)
            try:
                for drafts in playground.write(base, prompt, weights, **how):
                    left, right = (shown(draft, tint if tint in weights else next(iter(weights))) for draft in drafts)
                    yield left, right, again
            except UserError as error:
                raise gr.Error(str(error)) from error

        asked = [base, used, tint, prompt, temperature, length, seed, *sliders]
        events = [go.click, prompt.submit]
        running: list[Any] = [event(run, asked, [control, guided, code], show_progress="minimal") for event in events]
        stop.click(None, cancels=running)
        used.change(
            lambda used: [
                gr.update(visible=name in used)
                for name in [*arms, *playground.dials, *[""] * MOST_DIALS][: len(sliders)]
            ],
            used, sliders,
        )  # fmt: skip
        _dial_maker(playground, [used, tint, *sliders])
        copied.click(None, code, js="(text) => { navigator.clipboard.writeText(text); }")
    return blocks


def _dial_slider(playground: Playground, place: int) -> dict[str, Any]:
    """What the slider of the dial at that place shows; it is hidden while there is none."""
    dials = list(playground.dials.values())
    if place >= len(dials):
        return {"label": "α", "value": 0.0, "visible": False}
    return {"label": f"α {dials[place].name}", "value": 0.5, "visible": True, "info": dials[place].wanted}


def _dial_maker(playground: Playground, controls: Sequence[Any]) -> None:
    """Two sentences and a button; `controls` are what a new dial changes: the check boxes, the tint, the sliders."""
    with gr.Accordion("Make a dial from two sentences", open=False, elem_id="make-a-dial"):
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
                for said in playground.make(name.strip(), wanted, unwanted):
                    yield [said, *unchanged]
            except UserError as error:
                raise gr.Error(str(error)) from error
            names = [*playground.arms, *playground.dials]
            chosen = [one for one in names if one in used or one == name.strip()]
            sliders = [gr.update(**_dial_slider(playground, place)) for place in range(MOST_DIALS)]
            arms = [gr.update() for _ in playground.arms]
            yield [gr.update(), gr.update(choices=names, value=chosen), gr.update(choices=names), *arms, *sliders]

        make.click(run, [name, wanted, unwanted, controls[0]], [progress, *controls], concurrency_id="dial")
        cancel.click(playground.making.cancel, None, None, queue=False)


def serve(playground: Playground, port: int | None, wait: bool = True) -> gr.Blocks:
    """Serve the page on loopback, one request at a time and few waiting; return once it is up, or interrupted."""
    blocks = page(playground).queue(max_size=QUEUE, default_concurrency_limit=1)
    theme = gr.themes.Base(font=_FONTS, font_mono=["ui-monospace", "monospace"])
    blocks.launch(
        server_name="127.0.0.1", server_port=port, share=False, theme=theme, footer_links=[], max_threads=4,
        enable_monitoring=False, max_file_size=0, prevent_thread_lock=not wait, quiet=not wait,
    )  # fmt: skip
    return blocks


def main() -> None:
    """Serve the page until it is interrupted."""
    parser = ArgumentParser(
        "python -m pipeline.report.playground", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=7860)
    given = parser.parse_args()
    serve(Playground(load_params(), Workspace()), given.port)


if __name__ == "__main__":
    from pipeline.config.errors import guard

    with guard():
        main()
