"""identify: the digest of a model that judges or labels: results/identify/<role>/<objective>.json.

python -m pipeline identify --role judge --objective helpfulness      # the folder that `inputs` names, `dvc repro` does
"""

from pathlib import Path

from pipeline.config.errors import UserError
from pipeline.config.judges import LocalJudge, RewardJudge
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import write_json
from pipeline.models.identity import folder_identity


def run(params: Params, workspace: Workspace, role: str, objective: str) -> None:
    """Write the digest of the model that judges an objective, or labels its pairs; who asks it depends on that.

    Args:
        params: the experiment.
        workspace: where models and results are.
        role: judge, or annotator.
        objective: what it says something of.

    Raises:
        UserError: there is no such model on this machine.
    """
    if objective not in params.objectives:
        raise UserError(f"there is no objective {objective}: choose one of {', '.join(params.objectives)}.")
    judge = params.judge if role == "judge" else params.objectives[objective].annotator
    if isinstance(judge, RewardJudge) and objective in judge.models:
        folder = Path(judge.models[objective].location)
    elif isinstance(judge, LocalJudge):
        folder = workspace.model(judge.model)
    else:
        raise UserError(f"the {role} of {objective} is not a model on this machine: there is nothing to identify.")
    if not folder.is_dir():
        raise UserError(f"the {role} of {objective}: there is no folder {folder}: correct its location.")
    write_json(workspace.results / "identify" / role / f"{objective}.json", {"digest": folder_identity(folder)})
    print(f"identify: {role} of {objective}: {folder}")
