"""generate: every test prompt at every point of the sweep, results/generate/rows.jsonl.

python -m pipeline generate shard=3/8   # one of eight processes; `dvc repro` then finds the rows of all
"""

from pathlib import Path

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl
from pipeline.data.responses import write_generated
from pipeline.generation.rows import Shard, generate_shard, generate_sweep, prompts_with_room


def run(params: Params, workspace: Workspace, shard: str | None = None, *, prompts: Path | None = None) -> None:
    """Generate the sweep, or a shard of it into the row store; `prompts` defaults to those that prepare wrote."""
    file = prompts or workspace.results / "prepare" / "prompts.jsonl"
    test_prompts = [row["prompt"] for _, row in read_jsonl(file)]
    test_prompts = prompts_with_room(params, workspace, [params.base], test_prompts)
    if shard is None:
        rows = generate_sweep(params, workspace, params.base, test_prompts)
        write_generated(workspace.results / "generate" / "rows.jsonl", rows)
    else:
        count, store = generate_shard(params, workspace, params.base, test_prompts, Shard.parse(shard))
        print(f"generate: the {count} rows of {shard} are in {store}; when all shards are there, run `dvc repro`")
