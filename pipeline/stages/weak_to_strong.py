"""weak_to_strong: the ARMs on every base of the ladder: table, figure and page, results/<weak_to_strong.name>/.

python -m pipeline weak_to_strong
"""

import json

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl, replacing
from pipeline.data.responses import write_generated
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.judges.session import open_judge
from pipeline.evaluation.judging import scored_frame
from pipeline.evaluation.ladder import lines_of, table
from pipeline.evaluation.statistics import Bootstrap
from pipeline.generation.ladder import Sampled, judge_bases, sample
from pipeline.generation.rows import prompts_with_room
from pipeline.report import figures, markdown, pages, terminal


def run(params: Params, workspace: Workspace) -> None:
    """Steer each base of `params.weak_to_strong`, compare with what tuning it gives."""
    results, out = workspace.results, workspace.results / params.weak_to_strong.name
    prompts = [row["prompt"] for _, row in read_jsonl(results / "prepare" / "prompts.jsonl")]
    bases = params.weak_to_strong.bases
    # Before anything is generated that it could not judge.
    judge = open_judge(params.judge, params.objectives, Resources(params.models, workspace, params.decoding.device))
    prompts = prompts_with_room(params, workspace, bases, prompts)
    sampled: dict[str, Sampled] = {}
    for base in reversed(bases):  # from the largest, so that what does not fit shows at once
        sampled[base] = sample(params, workspace, base, prompts)
    rows = judge_bases(params, {base: sampled[base] for base in bases}, judge)
    scored = scored_frame(rows, params.objectives)
    ladder = params.weak_to_strong
    named = lines_of(params.sweep, list(params.objectives), params.arm.base, ladder.best_of, ladder.methods)
    lines = table(scored, named, params.objectives, Bootstrap.of(params.judge, params.seed))
    write_generated(out / "rows.jsonl", rows)
    with replacing(out / "table.csv") as stream:
        lines.to_csv(stream, index=False)
    drawn = figures.ladder(lines, list(params.objectives))
    drawn.save(out / "figure.png")
    names = dict.fromkeys([params.arm.base, *bases])
    known = {name: json.loads((results / "models" / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    page = out / "index.html"
    pages.ladder(params, lines, scored, known, drawn, page)
    markdown.ladder_page(lines, list(params.objectives), params.arm.base, out / "README.md")
    terminal.ladder(lines, list(params.objectives))
    print(f"weak_to_strong: open {page}")
