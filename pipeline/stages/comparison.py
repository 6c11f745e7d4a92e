"""comparison: every method at every point of the sweep: tables, figures and page, results/<comparison.name>/.

python -m pipeline comparison
"""

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl, replacing, write_json
from pipeline.data.responses import write_generated
from pipeline.evaluation.judging import scored_frame
from pipeline.evaluation.standings import alpaca_eval
from pipeline.generation.comparison import generate, open_comparing_judge, standings_of, training_cost
from pipeline.generation.rows import prompts_with_room
from pipeline.report import figures, markdown, pages, terminal


def run(params: Params, workspace: Workspace) -> None:
    """Ask every method of `params.comparison`, and compare."""
    out = workspace.results / params.comparison.name
    prompts = [row["prompt"] for _, row in read_jsonl(workspace.results / "prepare" / "prompts.jsonl")]
    judge = open_comparing_judge(params, workspace)
    prompts = prompts_with_room(params, workspace, [params.base], prompts[: params.comparison.prompts])
    training = training_cost(params, workspace)  # refuses what is not trained before anything is generated
    rows = generate(params, workspace, prompts, judge)
    scored = scored_frame(rows, params.objectives)
    standings = standings_of(params, scored)
    tables = {
        "table": standings.table(training),
        "fronts": standings.fronts(),
        "matched": standings.matched(),
        "wins": standings.win_rates(),
    }
    write_generated(out / "rows.jsonl", rows)
    for name, frame in tables.items():
        with replacing(out / f"{name}.csv") as stream:
            frame.to_csv(stream, index=False)
    for line, answers in alpaca_eval(scored).items():
        write_json(out / "alpaca_eval" / f"{line.replace('/', '-').replace(' ', '-')}.json", answers)
    objectives = list(params.objectives)
    drawings = [figures.fronts(tables["table"], objectives), figures.rewards_kl(tables["table"], objectives)]
    drawings[0].save(out / "fronts.png")
    drawings[1].save(out / "reward_kl.png")
    pages.comparison(params, tables, scored, drawings, out / "index.html")
    markdown.comparison_page(tables, objectives, params.comparison.against, out / "README.md")
    terminal.comparison(tables["fronts"])
    print(f"comparison: open {out / 'index.html'}")
