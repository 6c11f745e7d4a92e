"""A local page: type a prompt, move a slider per objective, read the base beside the guided text; make a dial.

    python -m pipeline playground --port 7860      # what `make playground` runs

The models are those of params.yaml that are below models/. Everything stays on this machine: the page listens on
loopback alone, asks nobody for anything and counts nothing.
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from pipeline.config.errors import UserError
from pipeline.config.load import load_params
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.decoding.decoder import GuidedDecoder, PartialGeneration, Request
from pipeline.decoding.token_colours import coloured
from pipeline.generation.model_set import ModelSet
from pipeline.report import dial_maker, target_panel
from pipeline.report.dial_maker import MOST_DIALS, DialMaker, slider_of
from pipeline.report.target_panel import TargetChooser

LONGEST_PROMPT, MOST_TOKENS, QUEUE = 4000, 512, 8
_CODE = """from pathlib import PosixPath

from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace
from pipeline.decoding.request import Request
from pipeline.generation.model_set import ModelSet

dials = {dials!r}
models = ModelSet(load_params(), Workspace(), {base!r}, {arms!r}, dials)  # in the project's folder
decoder = models.decoder({device!r}, 2)
prompt = {prompt!r}
options = {how!r}
control, guided = Request(prompt, {off!r}, **options), Request(prompt, {weights!r}, **options)
*_, (plain, steered) = decoder.stream([control, guided])
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
        self.maker = DialMaker(params, workspace)
        self.chooser = TargetChooser(params, workspace, lambda: self._loaded.cache_clear())
        if not self.bases or not (self.arms or self.maker.dials):
            raise UserError(f"there is no base or no ARM below {workspace.models} yet: run `make repro` first.")
        self._loaded = lru_cache(maxsize=1)(self._load)  # one base at a time; weights are no part of it

    def _load(self, base: str, arms: tuple[str, ...], dials: tuple[tuple[str, Path, float], ...]) -> GuidedDecoder:
        folders = {name: folder for name, folder, _ in dials}
        return ModelSet(self.params, self._workspace, base, arms, folders).decoder(self.params.decoding.device, 2)

    def write(
        self, base: str, prompt: str, weights: Mapping[str, float], **how: float
    ) -> Iterator[list[PartialGeneration]]:
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
        dials, law = self.maker.guides(base, weights), self.maker.law(base, weights)
        requests = [Request(prompt, alphas, **how) for alphas in (dict.fromkeys(weights, 0.0), law)]  # type: ignore[arg-type]
        # A dial that was made anew lies in the same folder: its file's time tells the two apart.
        loaded = tuple((name, folder, (folder.parent / "dial.json").stat().st_mtime) for name, folder in dials.items())
        yield from self._loaded(base, tuple(weights), loaded).stream(requests)

    def code(self, base: str, prompt: str, weights: Mapping[str, float], **how: float) -> str:
        """The Python that writes the same two responses."""
        return _CODE.format(
            base=base, arms=list(weights), dials=self.maker.guides(base, weights), prompt=prompt,
            weights=self.maker.law(base, weights), off=dict.fromkeys(weights, 0.0), how=how,
            device=self.params.decoding.device,
        )  # fmt: skip


def shown(draft: PartialGeneration, arm: str) -> str:
    """A response in the colours of an ARM, as HTML."""
    facts = [f"{name} {sum(rewards):+.1f} nats" for name, rewards in draft.rewards.items()]
    if draft.generation is not None:
        facts.append(f"KL to the base {draft.generation.kl:.1f} nats, {len(draft.tokens)} tokens")
    return coloured(draft.texts, draft.rewards[arm]) + f"<small>{' · '.join(facts)}</small>"


def page(playground: Playground) -> gr.Blocks:
    """The page, not yet served."""
    arms, decoding = playground.arms, playground.params.decoding
    names = [*arms, *playground.maker.dials]
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
                    gr.Slider(-1.0, 2.0, step=0.05, elem_id=f"alpha-dial-{place}", **slider_of(playground.maker, place))
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
            shown_names = [*arms, *playground.maker.dials]
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

        inputs = [base, used, tint, prompt, temperature, length, seed, *sliders]
        events = [go.click, prompt.submit]
        running: list[Any] = [event(run, inputs, [control, guided, code], show_progress="minimal") for event in events]
        stop.click(None, cancels=running)
        used.change(
            lambda used: [
                gr.update(visible=name in used)
                for name in [*arms, *playground.maker.dials, *[""] * MOST_DIALS][: len(sliders)]
            ],
            used, sliders,
        )  # fmt: skip
        if set(arms) == set(playground.params.objectives):
            target_panel.panel(playground.chooser, arms, sliders[: len(arms)])
        dial_maker.panel(playground.maker, arms, [used, tint, *sliders])
        copied.click(None, code, js="(text) => { navigator.clipboard.writeText(text); }")
    return blocks


def serve(playground: Playground, port: int | None, wait: bool = True) -> gr.Blocks:
    """Serve the page on loopback, one request at a time and few waiting; return once it is up, or interrupted."""
    blocks = page(playground).queue(max_size=QUEUE, default_concurrency_limit=1)
    theme = gr.themes.Base(font=_FONTS, font_mono=["ui-monospace", "monospace"])
    blocks.launch(
        server_name="127.0.0.1", server_port=port, share=False, theme=theme, footer_links=[], max_threads=4,
        enable_monitoring=False, max_file_size=0, prevent_thread_lock=not wait, quiet=not wait,
    )  # fmt: skip
    return blocks


def main(arguments: Sequence[str]) -> None:
    """Serve the page until it is interrupted."""
    parser = ArgumentParser(
        "python -m pipeline playground", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args(arguments)
    serve(Playground(load_params(), Workspace()), options.port)
