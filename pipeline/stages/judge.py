"""judge: a score per objective for every row, and win rates against the control, results/judge/.

python -m pipeline judge
"""

from dataclasses import replace
from pathlib import Path

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row, read_jsonl, replacing, write_json
from pipeline.data.responses import read_generated, write_generated
from pipeline.evaluation import judging
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.judges.session import open_judge
from pipeline.evaluation.statistics import Bootstrap


def run(params: Params, workspace: Workspace, prepared: Path | None = None) -> None:
    """Judge what generate wrote; `prepared` is the results folder that holds prepare/, by default the same one."""
    judge = open_judge(params.judge, params.objectives, Resources(params.models, workspace, params.decoding.device))
    bootstrap = Bootstrap.of(params.judge, params.seed)
    held_out = (prepared or workspace.results) / "prepare" / "pairs"
    out = workspace.results / "judge"
    rows = [replace(row, tokens=()) for row in read_generated(workspace.results / "generate" / "rows.jsonl")]
    labelled = {name: _test_pairs(held_out / f"{name}.jsonl") for name in params.objectives}
    pairs = judging.card_pairs(labelled, params.judge.card_pairs, params.seed)
    control, objectives = params.sweep.control, list(params.objectives)
    compared = judging.responses_of(rows, control)
    judge.prepare(pairs, [(rows, compared)])
    card = judging.judge_card(pairs, judge, params.judge.kind, bootstrap)
    write_json(out / "card.json", card)  # before the rows are paid for
    for line in judging.card_lines(card):
        print(f"judge: {line}")
    judging.check_card(card)
    scored = judging.judge_rows(rows, judge, compared)
    write_generated(out / "scores.jsonl", scored)
    frame = judging.scored_frame(scored, objectives, ["point", "prompt", "sample"])
    wins = judging.win_rates(frame, control, objectives, bootstrap)
    with replacing(out / "wins.csv") as stream:
        wins.round(4).to_csv(stream, index=False)
    print(f"judge: {len(scored)} rows scored on {', '.join(params.objectives)}")


def _test_pairs(file: Path) -> list[Row]:
    return [row for _, row in read_jsonl(file) if row["split"] == "test"]
