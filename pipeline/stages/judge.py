"""judge: a score per objective for every row, and win rates against the control, results/judge/."""

import pandas as pd

from pipeline import judging
from pipeline.config import Params, Workspace
from pipeline.stages import main
from pipeline.store import read_jsonl, replacing, write_jsonl


def run(params: Params, workspace: Workspace) -> None:
    """Judge what generate wrote."""
    out = workspace.results / "judge"
    rows = [row for _, row in read_jsonl(workspace.results / "generate" / "rows.jsonl")]
    scored = judging.score_rows(rows, params.objectives)
    control, objectives = params.sweep.control, list(params.objectives)
    wins = judging.win_rates(pd.DataFrame(scored), control, objectives, params.judge, params.seed)
    write_jsonl(out / "scores.jsonl", scored)
    with replacing(out / "wins.csv") as stream:
        wins.round(4).to_csv(stream, index=False)
    print(f"judge: {len(scored)} rows scored on {', '.join(params.objectives)}")


if __name__ == "__main__":
    main(run)
