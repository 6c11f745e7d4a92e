"""Why this text: the token rewards of a response in the terminal.

    python -m pipeline.explain "Describe a rainy Monday." --weights positivity=1 conciseness=0.5
    python -m pipeline.explain "Describe a rainy Monday." --response "It rains. Lovely!" --position 2

Without a response one is generated at the weights. Every ARM of the objectives is shown, whether it guides or not.
"""

from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pipeline.config import Params, UserError, Workspace, load_params
from pipeline.decoder import GuidedDecoder, Request, Trace
from pipeline.generation import Served
from pipeline.trace import GUIDED

STRONGEST = 3.0  # nats at which a colour is full


def tint(reward: float) -> tuple[int, int, int]:
    """The background of a token: green where an ARM wants it more than the base, red where less, white at 0."""
    share = max(-1.0, min(1.0, reward / STRONGEST))
    full = (46, 160, 92) if share > 0 else (214, 86, 72)
    red, green, blue = (round(255 + (channel - 255) * abs(share)) for channel in full)
    return red, green, blue


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
    decoder: GuidedDecoder = Served(params, workspace, params.base, params.objectives).decoder(decoding.device, 1)
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
            line.append(text, Style(color="black", bgcolor=f"rgb({','.join(map(str, tint(reward)))})"))
        alpha = trace.request.weights.get(arm, 0.0)
        console.print(f"[bold]{arm}[/bold], α = {alpha:g}: {sum(rewards):+.1f} nats beside the base")
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
    for found in trace.alternatives(position, top):
        cells = [f"{found.probabilities[law]:.3f}" for law in laws]
        table.add_row(repr(found.text), *cells, style="bold" if found.chosen else "")
    console.print(table)


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise ArgumentTypeError(f"{text} is no weight: write objective=1.0") from error


def main() -> None:
    """Explain a response on the models of params.yaml."""
    parser = ArgumentParser(
        "python -m pipeline.explain", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt")
    parser.add_argument("--response", help="the text to explain; one is generated without it")
    parser.add_argument("--weights", nargs="*", type=_weight, default=[], metavar="OBJECTIVE=ALPHA")
    parser.add_argument("--position", type=int, help="of the token whose alternatives are shown, from 0")
    parser.add_argument("--top", type=int, default=5, help="alternatives per law")
    given = parser.parse_args()
    trace = explained(load_params(), Workspace(), given.prompt, given.response, dict(given.weights))
    show(trace, Console(), given.position, given.top)


if __name__ == "__main__":
    from pipeline.stages import guard

    with guard():
        main()
