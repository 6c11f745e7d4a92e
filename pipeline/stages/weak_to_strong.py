"""weak_to_strong: the ARMs on every base of the ladder: table, figure and page, results/<weak_to_strong.name>/.

python -m pipeline weak_to_strong
"""

import json

from pipeline import weak_to_strong
from pipeline.config import Workspace
from pipeline.generation import prompts_with_room
from pipeline.judging import check_judge, scored_frame
from pipeline.params import Params
from pipeline.report import figures, markdown, pages, terminal
from pipeline.store import Row, read_jsonl, replacing, write_jsonl


def run(params: Params, workspace: Workspace) -> None:
    """Steer each base of `params.weak_to_strong`, compare with what tuning it gives."""
    results, out = workspace.results, workspace.results / params.weak_to_strong.name
    prompts = [row["prompt"] for _, row in read_jsonl(results / "prepare" / "prompts.jsonl")]
    bases = params.weak_to_strong.bases
    check_judge(params, workspace)  # before anything is generated
    prompts = prompts_with_room(params, workspace, bases, prompts)
    weak_to_strong.lines_of(params)  # refuses what it cannot compare before anything is generated
    of_base: dict[str, list[Row]] = {}
    speeds: dict[tuple[str, str], float] = {}
    for base in reversed(bases):  # from the largest, so that what does not fit shows at once
        of_base[base] = weak_to_strong.generate(params, workspace, base, prompts)
        found = weak_to_strong.tokens_per_second(params, workspace, base, prompts)
        speeds |= {(base, point): speed for point, speed in found.items()}
    rows = [row for base in bases for row in of_base[base]]
    scored = scored_frame(rows, params.objectives)
    table = weak_to_strong.table(params, scored, speeds)
    write_jsonl(out / "rows.jsonl", rows)
    with replacing(out / "table.csv") as stream:
        table.to_csv(stream, index=False)
    drawn = figures.ladder(table, list(params.objectives))
    drawn.save(out / "figure.png")
    names = dict.fromkeys([params.arm.base, *bases])
    ladder = {name: json.loads((results / "fetch" / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    page = out / "index.html"
    pages.ladder(params, table, scored, ladder, drawn, page)
    markdown.ladder_page(table, list(params.objectives), params.arm.base, out / "README.md")
    terminal.ladder(table, list(params.objectives))
    print(f"weak_to_strong: open {page}")
