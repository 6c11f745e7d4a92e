"""The table of weak-to-strong guidance: one line per base and method.

Shapes: P prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from pipeline.config.schema import Params
from pipeline.data.files import Row
from pipeline.evaluation.statistics import bootstrap_mean, gap_recovered, prompt_means
from pipeline.evaluation.text_quality import quality_columns

UNDEFINED = "not defined: the gap's interval includes 0"


@dataclass(frozen=True)
class Line:
    """What one line of the table is about."""

    method: str
    objective: str  # the one that it is for, and that the recovered gap is measured on; empty: several
    arm: str  # whose ARM guides; empty without
    alpha: float | None  # of several objectives, the sum


def lines_of(params: Params) -> dict[str, Line]:
    """The lines of the table by the name of their rows: the points of the sweep, and best-of-N for each objective.

    The α of unguided points beside the control is that of guidance that sharpens as much.
    """
    first, control = next(iter(params.objectives)), params.sweep.control
    found = {}
    for name, point in params.sweep.points.items():
        weights = {objective: alpha for objective, alpha in point.weights.items() if alpha}
        if weights:
            objective, alpha = "" if len(weights) > 1 else next(iter(weights)), round(sum(weights.values()), 6)
            arm = "" if point.form == "dpo" else params.arm.base
            found[name] = Line(point.method, objective, arm, None if point.form == "dpo" else alpha)
        elif name == control:
            found[name] = Line("control", first, "", 0.0)
        else:
            found[name] = Line("sharpened", first, "", point.sharpen)
    best = f"best_of_{params.weak_to_strong.best_of}"
    return found | {f"{best}/{name}": Line(best, name, "", None) for name in params.objectives}


def table(params: Params, rows: pd.DataFrame) -> pd.DataFrame:
    """table.csv: one line per base and method, with intervals over prompts.

    Args:
        params: the experiment.
        rows: what `generate` made, for all bases.
    """
    return pd.DataFrame(_lines(params, rows)).round(4)


def _lines(params: Params, rows: pd.DataFrame) -> Iterator[Row]:
    judge, seed = params.judge, params.seed
    named = lines_of(params)
    tuned = {line.objective: name for name, line in named.items() if line.method == "dpo"}
    for base, of_base in rows.groupby("base", sort=False):
        means = {
            name: of_base[of_base.point == name].groupby("prompt", sort=True)[list(params.objectives)].mean()
            for name in named
        }
        for name, line in named.items():
            mine = of_base[of_base.point == name]
            row: Row = {"base": base, "method": line.method, "arm": line.arm, "alpha": line.alpha}
            if len(params.objectives) > 1:
                weights = params.sweep.points[name].weights if name in params.sweep.points else {}
                row |= {f"alpha_{objective}": weights.get(objective, 0.0) for objective in params.objectives}
                row["picked_by"] = line.objective if line.method.startswith("best_of") else ""
            intervals = {
                objective: bootstrap_mean(prompt_means(mine, objective), judge.confidence, judge.resamples, seed)
                for objective in params.objectives
            }
            for place, column in enumerate(("reward", "ci_low", "ci_high")):
                row |= {f"{column}_{objective}": found[place] for objective, found in intervals.items()}
            row["kl"] = mine.kl.mean()
            row |= quality_columns(mine, params.objectives, judge, seed)
            if "left_out" in mine:  # of the base's mass, per token
                row["left_out"] = mine.left_out.sum() / mine.n_tokens.sum()
            row |= dict.fromkeys(("gap_recovered", "gap_ci_low", "gap_ci_high"))
            upper = tuned.get(line.objective)
            if upper is not None and line.method not in ("control", "dpo"):
                three = [means[place][line.objective] for place in (name, params.sweep.control, upper)]
                guided_P, control_P, tuned_P = pd.concat(three, axis=1).dropna().to_numpy().T
                gap = gap_recovered(guided_P, control_P, tuned_P, judge.confidence, judge.resamples, seed)
                if gap is None:
                    row["gap_recovered"] = UNDEFINED
                else:
                    row |= dict(zip(("gap_recovered", "gap_ci_low", "gap_ci_high"), gap, strict=True))
            yield row
