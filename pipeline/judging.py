"""Judges: scores of single responses, and win rates of each point against the control.

The oracle judge scores with each objective's own scorer, so a pairwise verdict is a comparison of two scores.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from pipeline.config import Judge, Objective, UserError
from pipeline.pareto import bootstrap_mean
from pipeline.scorers import scorer
from pipeline.store import Row


def score_rows(rows: Sequence[Row], objectives: Mapping[str, Objective]) -> list[Row]:
    """The rows with one score per objective, under the objective's name.

    Raises:
        UserError: an objective has no scorer.
    """
    scorers = {}
    for name, objective in objectives.items():
        if objective.scorer is None:
            raise UserError(f"objectives.{name} has no scorer, which judge=oracle needs: set objectives.{name}.scorer.")
        scorers[name] = scorer(objective.scorer)
    return [{**row, **{name: score(row["response"]) for name, score in scorers.items()}} for row in rows]


def win_rates(scored: pd.DataFrame, control: str, objectives: Sequence[str], judge: Judge, seed: int) -> pd.DataFrame:
    """Win rate of every point against the control, prompt by prompt and sample by sample; a tie is half a win.

    Args:
        scored: one row per response: `point`, `prompt`, `sample`, and a score per objective.

    Returns:
        `point, objective, win_rate, ci_low, ci_high, ties, prompts`; intervals resample prompts.
    """
    keys = ["prompt", "sample"]
    against = scored[scored.point == control].set_index(keys)
    lines = []
    for point, mine in scored.groupby("point", sort=False):
        paired = mine.set_index(keys).join(against, rsuffix="_control", how="inner", validate="one_to_one")
        for name in objectives:
            difference = paired[name] - paired[f"{name}_control"]
            won = (difference > 0) + 0.5 * (difference == 0)
            by_prompt = won.groupby("prompt").mean().to_numpy()
            mean, low, high = bootstrap_mean(by_prompt, judge.confidence, judge.resamples, seed)
            lines.append((point, name, mean, low, high, int((difference == 0).sum()), len(by_prompt)))
    return pd.DataFrame(
        lines, columns=["point", "objective", "win_rate", "ci_low", "ci_high", "ties", "prompts"]
    )  # fmt: skip
