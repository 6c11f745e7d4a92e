"""Why this text: the token rewards of a response in the terminal.

    python -m pipeline trace "Describe a rainy Monday." --weights positivity=1 conciseness=0.5
    python -m pipeline trace "Describe a rainy Monday." --response "It rains. Lovely!" --position 2

Without a response one is generated at the weights. Every ARM of the objectives is shown, whether it guides or not.
"""

from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from pipeline.config.errors import UserError
from pipeline.config.load import load_params
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row
from pipeline.data.responses import GeneratedRow
from pipeline.decoding.decoder import GuidedDecoder, Request, Trace
from pipeline.decoding.token_colours import on_white
from pipeline.decoding.trace import GUIDED
from pipeline.generation.model_set import ModelSet
from pipeline.generation.rows import point_requests

_POINTS = 8  # of a sweep that are explained


def rows_explained(params: Params, workspace: Workspace, rows: Sequence[GeneratedRow]) -> list[Row]:
    """Traces of some of the generated rows, as JSON values with their `point`: evenly spaced prompts, at most 8 points.

    Args:
        params: the experiment; `params.explain` says how many prompts, tokens and alternatives.
        workspace: where the models are.
        rows: what `generate` wrote.

    Raises:
        UserError: as `GuidedDecoder.trace`.
    """
    config, base = params.explain, params.base
    prompts = prompts_explained(params, (row.prompt for row in rows))
    points = set(_spread(list(params.sweep.points), _POINTS))
    requests = {
        (point, request.prompt): request
        for point, request in point_requests(params, base, prompts)
        if point in points and request.sample == 0
    }
    written = {(row.point, row.prompt): row for row in rows if row.sample == 0}
    used = {*params.objectives, *(name for request in requests.values() for name in request.arms)}
    decoder: GuidedDecoder = ModelSet(params, workspace, base, used).decoder(params.decoding.device, 1)
    explained = []
    for prompt in tqdm(prompts, desc="explain", unit="prompt"):
        at = [point for point, of in requests if of == prompt]
        tokens = [written[point, prompt].tokens[: config.tokens] for point in at]
        everyone = dict.fromkeys(params.objectives, 0.0)
        asked = [requests[point, prompt] for point in at]
        asked = [replace(request, weights=everyone | dict(request.weights)) for request in asked]
        for point, trace in zip(at, decoder.traces(asked, tokens), strict=True):
            explained.append({"point": point, **trace.record(config.alternatives)})
    return explained


def prompts_explained(params: Params, prompts: Iterable[str]) -> list[str]:
    """Those of the prompts, repeated or not, whose rows `rows_explained` traces."""
    return _spread(list(dict.fromkeys(prompts)), params.explain.prompts)


def _spread(values: Sequence[str], count: int) -> list[str]:
    """So many of them, evenly spaced, the first and the last among them where there is room."""
    if len(values) <= count:
        return list(values)
    return [values[round(place * (len(values) - 1) / max(1, count - 1))] for place in range(count)]


def explained(
    params: Params, workspace: Workspace, prompt: str, response: str | None, weights: dict[str, float]
) -> Trace:
    """The trace of a response, or of one that is generated.

    Raises:
        UserError: a weight is of no objective, or something is not trained.
    """
    for name in weights:
        if name not in params.objectives:
            raise UserError(f"--weights names {name}, which is no objective: use {', '.join(params.objectives)}.")
    decoding = params.decoding
    request = Request(
        prompt, dict.fromkeys(params.objectives, 0.0) | weights, decoding.temperature, decoding.top_k, decoding.top_p,
        decoding.min_p, decoding.max_new_tokens, decoding.stop, params.seed,
    )  # fmt: skip
    decoder: GuidedDecoder = ModelSet(params, workspace, params.base, params.objectives).decoder(decoding.device, 1)
    if response is None:
        [(_, generation)] = decoder.generate([request])
        return decoder.trace(request, generation.tokens)
    return decoder.trace(request, decoder.response_ids(prompt, response))


def show(trace: Trace, console: Console, position: int | None, top: int) -> None:
    """Print the response once per ARM in its colours, sums, and the alternatives at a position.

    Raises:
        UserError: there is no such position.
    """
    for arm in trace.arms:
        rewards, line = trace.rewards(arm), Text()
        for text, reward in zip(trace.texts, rewards, strict=True):
            line.append(text, Style(color="black", bgcolor=f"rgb({','.join(map(str, on_white(reward)))})"))
        alpha = trace.request.weights.get(arm, 0.0)
        console.print(f"[bold]{arm}[/bold], α = {alpha:g}: {sum(rewards):+.1f} nats beside the base")
        console.print(line)
    if trace.proposals is not None:
        refused, line = trace.refused, Text()
        for text, instead in zip(trace.texts, refused, strict=True):
            line.append(text, "" if instead is None else "bold")
            line.append("" if instead is None else f"⟨{instead}⟩", "red strike")
        right = f"{refused.count(None)} of {len(refused)} tokens"
        console.print(f"[bold]drafted[/bold]: {right}; behind each of the others what was refused in its place")
        console.print(line)
    sums = "   ".join(f"{law} {sum(trace.token_logps(law)):.1f}" for law in trace.logps)
    console.print(f"log π(y|x) in nats: {sums}")
    if position is None:
        return
    if not 0 <= position < len(trace.tokens):
        raise UserError(f"--position {position}: the response has the positions 0 to {len(trace.tokens) - 1}.")
    before = "".join(trace.texts[:position])[-40:]
    table = Table(title=f"position {position}, after {before!r}")
    laws = ["base", *trace.arms, GUIDED]
    table.add_column("token")
    for law in laws:
        table.add_column(law, justify="right")
    for alternative in trace.alternatives(position, top):
        cells = [f"{alternative.probabilities[law]:.3f}" for law in laws]
        table.add_row(repr(alternative.text), *cells, style="bold" if alternative.chosen else "")
    console.print(table)


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise ArgumentTypeError(f"{text} is no weight: write objective=1.0") from error


def main(arguments: Sequence[str]) -> None:
    """Explain a response on the models of params.yaml."""
    parser = ArgumentParser(
        "python -m pipeline trace", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt")
    parser.add_argument("--response", help="the text to explain; one is generated without it")
    parser.add_argument("--weights", nargs="*", type=_weight, default=[], metavar="OBJECTIVE=ALPHA")
    parser.add_argument("--position", type=int, help="of the token whose alternatives are shown, from 0")
    parser.add_argument("--top", type=int, default=5, help="alternatives per law")
    options = parser.parse_args(arguments)
    trace = explained(load_params(), Workspace(), options.prompt, options.response, dict(options.weights))
    show(trace, Console(), options.position, options.top)
