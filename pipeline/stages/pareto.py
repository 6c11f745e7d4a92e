"""pareto: the front as table, metrics and picture, the HTML report, and the W&B runs.

python -m pipeline pareto
"""

import json
from pathlib import Path

import pandas as pd

from pipeline.config.inputs import ALL
from pipeline.config.points import point_laws
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row, replacing, write_json
from pipeline.data.responses import read_generated
from pipeline.evaluation.front import front_metrics, front_table, long_scores
from pipeline.evaluation.judging import scored_frame
from pipeline.evaluation.statistics import Bootstrap
from pipeline.report import figures, markdown, pages, terminal, tracking


def run(params: Params, workspace: Workspace, trained: Path | None = None) -> None:
    """Draw the front; `trained` is the results folder that holds prepare/ and train/, by default the same one."""
    results, out = workspace.results, workspace.results / "pareto"
    shared = trained or results
    trained = shared / "train"
    data = json.loads((shared / "prepare" / "data_card.json").read_text())
    objectives = list(params.objectives)
    columns = ["point", "prompt", "sample", "response", "finish", "n_tokens", "logp_base", "kl"]
    scored = scored_frame(read_generated(results / "judge" / "scores.jsonl", objectives), objectives, columns)
    wins = pd.read_csv(results / "judge" / "wins.csv")
    bootstrap = Bootstrap.of(params.judge, params.seed)
    front = front_table(params.base, point_laws(params, params.base), params.objectives, scored, wins, bootstrap)
    card = json.loads((results / "judge" / "card.json").read_text())
    arms, curves = _trainings(params, trained)
    metrics = {**front_metrics(params.objectives, front), "arms": arms, "judge": card}
    tables = {
        "front.csv": front,
        "scores.csv": long_scores(front, objectives),
        "curves.csv": figures.curve_table(curves),
    }
    for name, table in tables.items():
        with replacing(out / name) as stream:
            table.to_csv(stream, index=False)
    write_json(out / "metrics.json", metrics)
    markdown.front_page(front, objectives, metrics, out / "README.md")
    drawings = [
        figures.front(front, objectives, params.sweep.control, metrics["knee"]),
        figures.reward_kl(front, objectives),
        figures.curves(tables["curves.csv"]),
    ]
    for drawing in drawings:
        drawing.save(out / f"{drawing.name}.png")
    tokens = json.loads((results / "explain" / "tokens.json").read_text(encoding="utf-8"))
    cards, page = {"metrics": metrics, "data": data}, results / "report" / "index.html"
    pages.report(params, {"front": front, "wins": wins}, cards, scored, tokens, drawings, page)
    group = tracking.group_of(params, scored.response)
    tracking.log_points(params, workspace, group, front.to_dict("records"), scored)
    terminal.front(front, objectives, metrics)
    print(f"pareto: open {page}")


def _trainings(params: Params, folder: Path) -> tuple[dict[str, Row], pd.DataFrame]:
    """What training measured of each objective's ARM, and the curves, of which one for all mixes has one."""
    names = [ALL] if params.arm.for_all_mixes else list(params.objectives)
    metrics = {name: json.loads((folder / name / "metrics.json").read_text()) for name in names}
    curves = pd.concat([pd.read_csv(folder / name / "curve.csv").assign(objective=name) for name in names])
    if params.arm.for_all_mixes:
        whole = metrics[ALL]
        metrics = {name: whole | end for name, end in whole.pop("objectives").items()}
    return metrics, curves
