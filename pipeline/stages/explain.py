"""explain: the token rewards of some responses, results/explain/tokens.json.

python -m pipeline explain
"""

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row, read_jsonl, write_json
from pipeline.generation import explain


def run(params: Params, workspace: Workspace) -> None:
    """Trace what `params.explain` asks for of the rows that generate wrote."""
    explained: list[Row] = []
    if params.explain.prompts:
        file = workspace.results / "generate" / "rows.jsonl"
        prompts = set(explain.prompts_explained(params, (row["prompt"] for _, row in read_jsonl(file))))
        rows = [row for _, row in read_jsonl(file) if row["prompt"] in prompts]  # few of perhaps very many
        explained = explain.rows_explained(params, workspace, rows)
    write_json(workspace.results / "explain" / "tokens.json", explained)
    print(f"explain: token rewards of {len(explained)} responses")
    if again := sum(trace["retokenised"] for trace in explained):
        print(f"explain: {again} of them were stored without their tokens, so that their texts are tokenised again")
