"""fetch: the base model as a local folder, models/base."""

from pipeline import models
from pipeline.config import Params, Workspace
from pipeline.stages import main


def run(params: Params, workspace: Workspace) -> None:
    """Fetch the base named by `params.base`."""
    models.fetch(params.base, workspace.models / "base")
    print(f"fetch: {params.base.name} is in {workspace.models / 'base'}")


if __name__ == "__main__":
    main(run)
