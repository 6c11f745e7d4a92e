"""explain: the token rewards of some responses, results/explain/tokens.json.

python -m pipeline explain
"""

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row, write_json
from pipeline.data.responses import read_generated
from pipeline.generation import explain


def run(params: Params, workspace: Workspace) -> None:
    """Trace what `params.explain` asks for of the rows that generate wrote."""
    explained: list[Row] = []
    if params.explain.prompts:
        file = workspace.results / "generate" / "rows.jsonl"
        prompts = set(explain.prompts_explained(params, (row.prompt for row in read_generated(file))))
        rows = [row for row in read_generated(file) if row.prompt in prompts]  # few of perhaps very many
        explained = explain.rows_explained(params, workspace, rows)
    write_json(workspace.results / "explain" / "tokens.json", explained)
    print(f"explain: token rewards of {len(explained)} responses")
