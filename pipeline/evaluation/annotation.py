"""Labels by a judge: sampled responses compared by a model with a rubric, or scored by a reward model.

RLAIF (arXiv 2309.00267): both orders are asked, and what has no verdict has no label. Replies and rewards are kept in
the stores of the judges, so that nothing is asked, or paid for, twice.
"""

from collections import Counter
from collections.abc import Sequence

from pipeline.config.judges import RewardJudge
from pipeline.config.schema import Objective
from pipeline.data.files import Row
from pipeline.data.responses import Response
from pipeline.data.splits import RESPONSES
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.judges.reward_model import RewardModels
from pipeline.evaluation.judges.verdicts import Verdicts, mean_score


def check_annotator(name: str, objective: Objective, resources: Resources) -> None:
    """Refuse, before anything is sampled for it, an annotator that lacks what it needs.

    Raises:
        UserError: it has no rubric, no key or no reward model.
    """
    annotator = objective.annotator
    if isinstance(annotator, RewardJudge):
        RewardModels(annotator, [name], resources)
    elif annotator is not None:
        Verdicts(annotator, [name], resources)


def annotate(rows: Sequence[Row], name: str, objective: Objective, resources: Resources) -> Counter[str]:
    """Give rows of two responses the objective's label: 0 or 1, None where the annotator prefers neither.

    Args:
        rows: those to label.
        name: the objective's.
        objective: whose annotator is asked.
        resources: models at hand, and the stores that keep what was answered.

    Returns:
        How many rows were labelled, tied, or undetermined, that is without a verdict in any order.

    Raises:
        UserError: the annotator stopped, or its budget is used up; replies so far are kept.
    """
    if isinstance(objective.annotator, RewardJudge):
        responses = [
            Response(prompt=row["prompt"], response=row[key], finish="eos" if row[f"ended_{place}"] else "length")
            for row in rows
            for place, key in enumerate(RESPONSES)
        ]
        models = RewardModels(objective.annotator, [name], resources)
        rewards = [reward.value for reward in models.of({name: responses})[name]]
        differences: list[float | None] = [
            first - second for first, second in zip(rewards[::2], rewards[1::2], strict=True)
        ]
        least = objective.tie
    else:
        assert objective.annotator is not None
        pairs = [(row["prompt"], row[RESPONSES[0]], row[RESPONSES[1]]) for row in rows]
        verdicts = Verdicts(objective.annotator, [name], resources).of({name: pairs})[name]
        means = map(mean_score, verdicts)
        differences, least = [None if verdict is None else verdict - 0.5 for verdict in means], 0.0
    counts: Counter[str] = Counter(labelled=0, ties=0, undetermined=0)
    for row, difference in zip(rows, differences, strict=True):
        decided = difference is not None and difference != 0 and abs(difference) >= least
        row[objective.label] = int(difference < 0) if decided and difference is not None else None
        counts["labelled" if decided else "undetermined" if difference is None else "ties"] += 1
    return counts
