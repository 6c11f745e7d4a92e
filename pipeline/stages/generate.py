"""generate: every test prompt at every point of the sweep, results/generate/rows.jsonl."""

from pathlib import Path

from pipeline import generation
from pipeline.config import Params, Workspace
from pipeline.stages import main
from pipeline.store import read_jsonl, write_jsonl


def run(params: Params, workspace: Workspace, prompts: Path | None = None) -> None:
    """Generate the sweep; `prompts` defaults to those that prepare wrote."""
    prompts = prompts or workspace.results / "prepare" / "prompts.jsonl"
    rows = generation.generate_sweep(params, workspace, params.base, [row["prompt"] for _, row in read_jsonl(prompts)])
    write_jsonl(workspace.results / "generate" / "rows.jsonl", rows)


if __name__ == "__main__":
    main(run)
