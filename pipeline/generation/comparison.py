"""GenARM beside other methods on equal terms: the same base, pairs, prompts and weights; what each earns and costs."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from pipeline.config.errors import UserError
from pipeline.config.schema import LlmJudge, LocalJudge, Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row
from pipeline.decoding.decoder import Request
from pipeline.evaluation.judging import check_judge, judge_rows, responses_of
from pipeline.evaluation.standings import UNGUIDED, entries
from pipeline.generation.methods.contender import Contender
from pipeline.generation.model_set import Decoder, ModelSet
from pipeline.generation.rows import generate_stored, point_requests

_TIMED_ROWS, _REPETITIONS, _TIMED_TOKENS = 8, 3, 24


def contenders(params: Params, workspace: Workspace) -> dict[str, Contender]:
    """Every method, ready to be asked for all of its lines.

    Raises:
        UserError: something is not trained.
    """
    lines = entries(params)
    return {
        name: Contender(method, params, workspace, [line.mix for line in lines if line.method == name and line.mix])
        for name, method in params.comparison.methods.items()
    }


def check(params: Params, workspace: Workspace) -> None:
    """Refuse, before anything is generated, what could not be judged.

    Raises:
        UserError: the judge lacks something, or it compares with a control that every method has its own of.
    """
    check_judge(params, workspace)
    control = params.sweep.control
    if isinstance(params.judge, LlmJudge | LocalJudge) and params.sweep.points[control].guided:
        raise UserError(f"sweep.control {control} is guided: name an unguided point for judge={params.judge.kind}.")


def generate(params: Params, workspace: Workspace, prompts: Sequence[str]) -> list[Row]:
    """Rows of all lines with the judge's scores, each with `method`, `point` and the `line` it belongs to."""
    points = {name: point for name, point in params.sweep.points.items() if not point.guided}
    wanted = [*point_requests(replace(params, sweep=replace(params.sweep, points=points)), params.base, prompts)]
    plain = generate_stored([request for _, request in wanted], params, workspace, params.base, "generate")
    rows = [
        {"method": UNGUIDED, "point": point, "line": f"{UNGUIDED}/{point}", **row, "forwards": row["n_tokens"]}
        for (point, _), row in zip(wanted, plain, strict=True)
    ]
    control = responses_of(rows, params.sweep.control)
    for name, contender in contenders(params, workspace).items():
        print(f"comparison: {name}")
        lines = [line for line in entries(params) if line.method == name]
        asked = [
            (line, line.mix, contender.request(line.mix, prompt, sample))
            for prompt in prompts[: params.comparison.methods[name].prompts]
            for line in lines
            if line.mix
            for sample in range(params.decoding.samples_per_prompt)
        ]
        found = contender.rows([(mix, request) for _, mix, request in asked])
        rows += [
            {"method": name, "point": line.point, "line": line.name, **row}
            for (line, _, _), row in zip(asked, found, strict=True)
        ]
    return judge_rows(rows, params, workspace, control)


def tokens_per_second(params: Params, workspace: Workspace, prompts: Sequence[str]) -> dict[str, float]:
    """Speed of every method at its most mixed point, batch 8, prompts included: medians of repetitions.

    No more is in memory than a method and the unguided base, whose repetitions alternate: what slows the machine for
    a while slows both.
    """
    short = replace(params, decoding=replace(params.decoding, max_new_tokens=_TIMED_TOKENS, stop=()))
    asked = prompts[:_TIMED_ROWS]
    unguided: Decoder = ModelSet(short, workspace, params.base, ()).decoder(params.decoding.device, _TIMED_ROWS)
    plain = [Request(prompt, max_new_tokens=_TIMED_TOKENS, seed=params.seed) for prompt in asked]
    speeds: dict[str, list[float]] = {UNGUIDED: []}
    for name, method in params.comparison.methods.items():
        mixes = [line.mix for line in entries(params) if line.method == name and line.front and line.mix]
        mix = max(mixes, key=lambda mix: min(mix.shares.values()) if len(mix.shares) > 1 else 0.0)
        contender = Contender(method, short, workspace, [mix])
        requests = [contender.request(mix, prompt, 0) for prompt in asked]
        timed = {UNGUIDED: (unguided, plain), name: (contender.decoder(_TIMED_ROWS), requests)}
        speeds[name] = []
        for repetition in range(_REPETITIONS + 1):
            for one, (decoder, of) in timed.items():
                started = time.perf_counter()
                tokens = sum(len(generation.tokens) for _, generation in decoder.generate(of))
                if repetition:  # the first warms up
                    speeds[one].append(tokens / (time.perf_counter() - started))
        del timed  # before the next method's models are loaded
    return {name: median(measured) for name, measured in speeds.items()}


def training_cost(params: Params, workspace: Workspace) -> dict[str, tuple[int, float]]:
    """Tokens and seconds of training that each method needs for all points of the sweep."""
    found = {UNGUIDED: (0, 0.0)}
    for name, contender in contenders(params, workspace).items():
        told = []
        for folder in contender.trained:
            arm = folder.parent == workspace.arm(folder.name).parent
            where = ("train", folder.name) if arm else ("tune", params.base, folder.name)
            told.append(json.loads((workspace.results.joinpath(*where) / "metrics.json").read_text(encoding="utf-8")))
        found[name] = sum(one["tokens"] for one in told), round(sum(one["seconds"] for one in told), 1)
    return found
