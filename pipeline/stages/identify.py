"""identify: the digest of a reward model's folder outside the project, results/identify/<objective>.json.

python -m pipeline identify --objective helpfulness      # where judge=reward_model names such a folder
"""

from pathlib import Path

from pipeline.config.errors import UserError
from pipeline.config.schema import Params, RewardJudge
from pipeline.config.workspace import Workspace
from pipeline.data.files import write_json
from pipeline.models.identity import folder_identity


def run(params: Params, workspace: Workspace, objective: str) -> None:
    """Write the digest of the folder that `judge.models` names for an objective; who judges depends on it.

    Raises:
        UserError: the judge has no reward model for the objective, or it is not a folder.
    """
    judge = params.judge
    if not isinstance(judge, RewardJudge) or objective not in judge.models:
        raise UserError(f"the judge has no reward model for {objective}: set judge.models.{objective}.")
    folder = Path(judge.models[objective].location)
    if not folder.is_dir():
        raise UserError(f"judge.models.{objective}: there is no folder {folder}: correct its location.")
    write_json(workspace.results / "identify" / f"{objective}.json", {"digest": folder_identity(folder)})
    print(f"identify: {objective}: {folder}")
