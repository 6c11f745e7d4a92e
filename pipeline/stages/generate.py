"""generate: every test prompt at every point of the sweep, results/generate/rows.jsonl."""

from pathlib import Path

from pipeline import generation
from pipeline.config import Params, Workspace
from pipeline.stages import main
from pipeline.store import read_jsonl, write_jsonl


def run(params: Params, workspace: Workspace, prompts: Path | None = None) -> None:
    """Generate the sweep; `prompts` defaults to those that prepare wrote."""
    prompts = prompts or workspace.results / "prepare" / "prompts.jsonl"
    wanted = list(generation.point_requests(params, [row["prompt"] for _, row in read_jsonl(prompts)]))
    rows = generation.generate_stored(
        [request for _, request in wanted],
        params,
        {name: workspace.adapter(name) for name in params.objectives},
        workspace.models / "base",
        workspace.scratch / "store" / "generate.jsonl",
        "generate",
    )
    labelled = ({"point": point, **row} for (point, _), row in zip(wanted, rows, strict=True))
    write_jsonl(workspace.results / "generate" / "rows.jsonl", labelled)


if __name__ == "__main__":
    main(run)
