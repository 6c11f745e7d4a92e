"""judge: a score per objective for every row, and win rates against the control, results/judge/.

python -m pipeline.stages.judge
"""

from pathlib import Path

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row, read_jsonl, replacing, write_json, write_jsonl
from pipeline.evaluation import judging
from pipeline.stages import main


def run(params: Params, workspace: Workspace, prepared: Path | None = None) -> None:
    """Judge what generate wrote; `prepared` is the results folder that holds prepare/, by default the same one."""
    held_out = (prepared or workspace.results) / "prepare" / "pairs"
    out = workspace.results / "judge"
    rows = [judging.without_tokens(row) for _, row in read_jsonl(workspace.results / "generate" / "rows.jsonl")]
    pairs = {name: _test_pairs(held_out / f"{name}.jsonl") for name in params.objectives}
    card = judging.judge_card(pairs, params, workspace)
    for name, told in card["objectives"].items():
        accuracy = told["accuracy"]["value"]
        shown = "no pairs to agree with" if accuracy is None else f"{accuracy:.3f} of held-out pairs as labelled"
        print(f"judge: {params.judge.kind}: {name}: {shown}, undetermined {told['undetermined']:.3f}")
    control, objectives = params.sweep.control, list(params.objectives)
    scored = judging.judge_rows(rows, params, workspace, judging.responses_of(rows, control))
    frame = judging.scored_frame(scored, objectives, ["point", "prompt", "sample"])
    wins = judging.win_rates(frame, control, objectives, params.judge, params.seed)
    write_json(out / "card.json", card)
    write_jsonl(out / "scores.jsonl", scored)
    with replacing(out / "wins.csv") as stream:
        wins.round(4).to_csv(stream, index=False)
    print(f"judge: {len(scored)} rows scored on {', '.join(params.objectives)}")


def _test_pairs(file: Path) -> list[Row]:
    return [row for _, row in read_jsonl(file) if row["split"] == "test"]


if __name__ == "__main__":
    main(run)
