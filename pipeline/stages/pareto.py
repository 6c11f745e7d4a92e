"""pareto: the front as table, metrics and picture, the HTML report, and the W&B runs."""

import json
from pathlib import Path

import pandas as pd

from pipeline import pareto, report, tracking
from pipeline.config import Params, Workspace
from pipeline.stages import main
from pipeline.store import digest, read_jsonl, replacing, write_json


def run(params: Params, workspace: Workspace, trained: Path | None = None) -> None:
    """Draw the front; `trained` is the results folder that holds prepare/ and train/, by default the same one."""
    results, out = workspace.results, workspace.results / "pareto"
    shared = trained or results
    trained = shared / "train"
    data = json.loads((shared / "prepare" / "data_card.json").read_text())
    scored = pd.DataFrame([row for _, row in read_jsonl(results / "judge" / "scores.jsonl")])
    wins = pd.read_csv(results / "judge" / "wins.csv")
    front = pareto.front_table(params, scored, wins)
    card = json.loads((results / "judge" / "card.json").read_text())
    arms = {name: json.loads((trained / name / "metrics.json").read_text()) for name in params.objectives}
    curves = pd.concat([pd.read_csv(trained / name / "curve.csv").assign(objective=name) for name in arms])
    metrics = {**pareto.front_metrics(params, front), "arms": arms, "judge": card}
    tables = {
        "front.csv": front,
        "scores.csv": pareto.long_scores(front, list(params.objectives)),
        "curves.csv": report.curve_table(curves),
    }
    for name, table in tables.items():
        with replacing(out / name) as stream:
            table.to_csv(stream, index=False)
    write_json(out / "metrics.json", metrics)
    report.draw_front(front, list(params.objectives), params.sweep.control, out / "front.png")
    report.draw_curves(tables["curves.csv"], out / "curves.png")
    report.write_html(params, front, wins, metrics, data, scored, out, results / "report" / "index.html")
    group = f"{params.base}-{digest(scored.response.tolist())[:8]}"
    tracking.log_points(params, workspace, group, front.to_dict("records"), scored.to_dict("records"))
    report.print_front(front, list(params.objectives), metrics)
    print(f"pareto: open {results / 'report' / 'index.html'}")


if __name__ == "__main__":
    main(run)
