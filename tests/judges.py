"""The judges of an experiment, opened with what they find on this machine."""

from typing import Any

from pipeline.config.judges import LlmJudge, LocalJudge, RewardJudge
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.responses import GeneratedRow
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.judges.reward_model import RewardModels
from pipeline.evaluation.judges.session import JudgeSession, open_judge
from pipeline.evaluation.judges.verdicts import Verdicts


def resources_of(params: Params, workspace: Workspace) -> Resources:
    return Resources(params.models, workspace, params.decoding.device)


def judge_of(params: Params, workspace: Workspace) -> JudgeSession:
    return open_judge(params.judge, params.objectives, resources_of(params, workspace))


def verdicts_of(judge: LlmJudge | LocalJudge, params: Params, workspace: Workspace) -> Verdicts:
    return Verdicts(judge, list(params.objectives), resources_of(params, workspace))


def rewards_of(judge: RewardJudge, params: Params, workspace: Workspace) -> RewardModels:
    return RewardModels(judge, list(params.objectives), resources_of(params, workspace))


def generated(prompt: str, response: str, **fields: Any) -> GeneratedRow:
    """A row whose measures do not matter."""
    nothing: dict[str, Any] = {
        "prompt_tokens": 4, "n_tokens": len(response.split()), "logp": 0.0, "logp_base": 0.0, "kl": 0.0, "sample": 0,
        "seed": 0, "stream": "",
    }  # fmt: skip
    return GeneratedRow(prompt=prompt, response=response, **nothing | fields)
