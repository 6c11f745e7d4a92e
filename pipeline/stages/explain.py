"""explain: the token rewards of some responses, results/explain/tokens.json.

python -m pipeline.stages.explain
"""

from pipeline import explain
from pipeline.config import Workspace
from pipeline.params import Params
from pipeline.stages import main
from pipeline.store import Row, read_jsonl, write_json


def run(params: Params, workspace: Workspace) -> None:
    """Trace what `params.explain` asks for of the rows that generate wrote."""
    rows = [row for _, row in read_jsonl(workspace.results / "generate" / "rows.jsonl")]
    found: list[Row] = explain.rows_explained(params, workspace, rows) if params.explain.prompts else []
    write_json(workspace.results / "explain" / "tokens.json", found)
    print(f"explain: token rewards of {len(found)} responses")
    if again := sum(trace["retokenised"] for trace in found):
        print(f"explain: {again} of them were stored without their tokens, so that their texts are tokenised again")


if __name__ == "__main__":
    main(run)
