"""GenARM beside other methods on equal terms: the same base, pairs, prompts and weights; what each earns and costs."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from pipeline.config.errors import UserError
from pipeline.config.judges import LlmJudge, LocalJudge
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.responses import GeneratedRow
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.judges.session import JudgeSession, open_judge
from pipeline.evaluation.judging import judge_rows, responses_of
from pipeline.evaluation.standings import UNGUIDED, Entry, Standings, entries
from pipeline.evaluation.statistics import Bootstrap
from pipeline.generation.methods.compared_method import ComparedMethod
from pipeline.generation.rows import generate_stored, point_requests


def entries_of(params: Params) -> list[Entry]:
    """The lines of the experiment's comparison."""
    return entries(params.comparison.methods, params.sweep.points)


def standings_of(params: Params, scored: pd.DataFrame) -> Standings:
    """What the experiment's tables make of its judged rows."""
    bootstrap = Bootstrap.of(params.judge, params.seed)
    return Standings(scored, entries_of(params), params.comparison.against, params.objectives, bootstrap)


def compared_methods(params: Params, workspace: Workspace) -> dict[str, ComparedMethod]:
    """Every method, ready to be asked for all of its lines.

    Raises:
        UserError: something is not trained.
    """
    lines = entries_of(params)
    return {
        name: ComparedMethod(
            method, params, workspace, params.base, [line.mix for line in lines if line.method == name and line.mix]
        )
        for name, method in params.comparison.methods.items()
    }


def open_comparing_judge(params: Params, workspace: Workspace) -> JudgeSession:
    """The configured judge, opened before anything is generated that it could not judge.

    Raises:
        UserError: the judge lacks something, or it compares with a control that every method has its own of.
    """
    control = params.sweep.control
    if isinstance(params.judge, LlmJudge | LocalJudge) and params.sweep.points[control].guided:
        raise UserError(f"sweep.control {control} is guided: name an unguided point for judge={params.judge.kind}.")
    return open_judge(params.judge, params.objectives, Resources(params.models, workspace, params.decoding.device))


def generate(params: Params, workspace: Workspace, prompts: Sequence[str], judge: JudgeSession) -> list[GeneratedRow]:
    """Rows of all lines with the judge's scores, each with `method`, `point` and the `line` it belongs to."""
    points = {name: point for name, point in params.sweep.points.items() if not point.guided}
    unguided = [*point_requests(replace(params, sweep=replace(params.sweep, points=points)), params.base, prompts)]
    plain = generate_stored([request for _, request in unguided], params, workspace, params.base, "generate")
    rows = [
        replace(row, method=UNGUIDED, point=point, line=f"{UNGUIDED}/{point}", forwards=row.n_tokens)
        for (point, _), row in zip(unguided, plain, strict=True)
    ]
    control = responses_of(rows, params.sweep.control)
    for name, compared in compared_methods(params, workspace).items():
        print(f"comparison: {name}")
        lines = [line for line in entries_of(params) if line.method == name]
        requests = [
            (line, line.mix, compared.request(line.mix, prompt, sample))
            for prompt in prompts[: params.comparison.methods[name].prompts]
            for line in lines
            if line.mix
            for sample in range(params.decoding.samples_per_prompt)
        ]
        answered = compared.rows([(mix, request) for _, mix, request in requests])
        rows += [
            replace(row, method=name, point=line.point, line=line.name)
            for (line, _, _), row in zip(requests, answered, strict=True)
        ]
    judge.prepare({}, [(rows, control)])
    return judge_rows(rows, judge, control)


def training_cost(params: Params, workspace: Workspace) -> dict[str, int]:
    """Tokens that each method was trained on, for all points of the sweep."""
    tokens = {UNGUIDED: 0}
    for name, compared in compared_methods(params, workspace).items():
        tokens[name] = 0
        for folder in compared.trained:
            arm = folder.parent == workspace.arm(folder.name).parent
            where = ("train", folder.name) if arm else ("tune", params.base, folder.name)
            metrics = (workspace.results.joinpath(*where) / "metrics.json").read_text(encoding="utf-8")
            tokens[name] += json.loads(metrics)["tokens"]
    return tokens
