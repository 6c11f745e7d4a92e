"""The weights for an outcome, chosen on validation prompts, with what they promise.

    python -m pipeline choose --at-least positivity=0.8                            # at as little KL as possible
    python -m pipeline choose --at-least positivity=0.6 --maximise conciseness
    python -m pipeline choose --maximise worst --kl 16                             # the lowest reward, at KL 16 at most
    python -m pipeline choose --at-least positivity=0.8 --write gentle             # a point of params.yaml from now on

The points of the sweep are generated and judged on the validation prompts, and then further weight vectors where a
spline through the measured ones looks best. Rows and verdicts are kept, so another target costs only what is new.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from pipeline.config.errors import UserError
from pipeline.config.load import load_params, to_params
from pipeline.config.points import point_weights
from pipeline.config.schema import Params, Point
from pipeline.config.workspace import Workspace
from pipeline.data.files import replacing
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.judges.session import open_judge
from pipeline.evaluation.targets import WORST, Target
from pipeline.generation.targets import Choice, TargetSearch


def least(text: str) -> tuple[str, float]:
    """A bound as it is written, `positivity=0.8`.

    Raises:
        UserError: it is written otherwise.
    """
    name, _, bound = text.partition("=")
    try:
        return name, float(bound)
    except ValueError:
        raise UserError(f"--at-least {text} is not an objective and a number: write positivity=0.8.") from None


def described(choice: Choice, form: str, params: Params) -> str:
    """What was chosen, what it promises, and how to ask for it."""
    weights = {name: weight for name, weight in choice.weights.items() if weight}
    law = point_weights(Point(weights, form=form), params.arm.base == params.base)  # type: ignore[arg-type]
    body = {
        "model": params.base, "messages": [{"role": "user", "content": "Describe a rainy Monday morning."}],
        "max_tokens": params.decoding.max_new_tokens, "temperature": params.decoding.temperature,
        "guidance": {"weights": law},
    }  # fmt: skip
    lines = [] if choice.shortfall == 0 else ["choose: not attainable by weights like these; the nearest is"]
    lines += [f"choose: weights {json.dumps(weights)}, by {choice.measured} measured weight vectors"]
    lines += [f"choose: {name} {_interval(promise)}" for name, promise in choice.rewards.items()]
    lines += [
        f"choose: KL to the base {_interval(choice.kl, 1)} nats per response", "",
        "curl -s localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '" + json.dumps(body) + "'",
        "", f"Request(prompt, {law!r}, temperature={params.decoding.temperature:g}, "
        f"max_new_tokens={params.decoding.max_new_tokens})",
    ]  # fmt: skip
    return "\n".join(lines)


def _interval(promise: tuple[float, float, float], digits: int = 2) -> str:
    mean, low, high = promise
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def write_point(file: Path, name: str, weights: Mapping[str, float], form: str) -> None:
    """Add a point to the sweep in params.yaml, or put another in its place.

    Raises:
        UserError: it would not be valid then; nothing is written.
    """
    config = OmegaConf.load(file)
    point = {"weights": {objective: weight for objective, weight in weights.items() if weight}, "form": form}
    OmegaConf.update(config, f"sweep.points.{name}", point, merge=False, force_add=True)
    to_params(config, str(file))
    with replacing(file) as stream:
        stream.write(OmegaConf.to_yaml(config))


def main(arguments: Sequence[str]) -> None:
    """Choose weights for the project in the current folder."""
    parser = ArgumentParser(
        "python -m pipeline choose", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--at-least", action="append", default=[], metavar="OBJECTIVE=REWARD")
    parser.add_argument(
        "--maximise", metavar="OBJECTIVE", help=f"an objective, or `{WORST}`: the lowest of all rewards"
    )
    parser.add_argument("--kl", type=float, help="the largest mean KL to the base, nats per response")
    parser.add_argument("--form", choices=("plain", "log_ratio"), default="plain", help="of guidance")
    parser.add_argument("--samples", type=int, default=2, help="responses to each validation prompt")
    parser.add_argument("--points", type=int, default=6, help="further weight vectors to measure at most")
    parser.add_argument("--write", metavar="NAME", help="add the weights to params.yaml as a point of that name")
    options = parser.parse_args(arguments)
    params, workspace, file = load_params(), Workspace(), Path("params.yaml")
    target = Target(dict(map(least, options.at_least)), options.maximise, options.kl)
    target.check(list(params.objectives))  # before models are loaded
    judge = open_judge(params.judge, params.objectives, Resources(params.models, workspace, params.decoding.device))
    search = TargetSearch(params, workspace, judge, options.samples, options.form)
    choice = search.choose(target, options.points)
    print(described(choice, options.form, params))
    if options.write:
        write_point(file, options.write, choice.weights, options.form)
        print(f"choose: {file} has sweep.points.{options.write}: `dvc repro` judges it on the test prompts")
