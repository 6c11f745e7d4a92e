"""The table of weak-to-strong guidance: one line per base and method.

Shapes: P prompts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from pipeline.config.methods import Method
from pipeline.config.schema import Objective, Sweep
from pipeline.data.files import Row
from pipeline.evaluation.standings import entries
from pipeline.evaluation.statistics import Bootstrap, bootstrap_mean, gap_recovered, prompt_means
from pipeline.evaluation.text_quality import quality_columns

UNDEFINED = "not defined: the gap's interval includes 0"


@dataclass(frozen=True)
class Line:
    """What one line of the table is about."""

    method: str
    objective: str  # the one that it is for, and that the recovered gap is measured on; empty: several
    arm: str  # whose ARM guides; empty without
    alpha: float | None  # of several objectives, the sum
    weights: Mapping[str, float] = field(default_factory=dict)  # of the objectives


def lines_of(
    sweep: Sweep, objectives: Sequence[str], arm_base: str, best_of: int, methods: Mapping[str, Method] | None = None
) -> dict[str, Line]:
    """The lines of the table by the name of their rows: the points of the sweep, other methods there, and best-of-N.

    The α of unguided points beside the control is that of guidance that sharpens as much.

    Args:
        sweep: the points.
        objectives: of the run.
        arm_base: the model that the ARMs were made from.
        best_of: N, picked for each objective.
        methods: those that are asked at the guided points, by name.
    """
    lines = {}
    for name, point in sweep.points.items():
        weights = {objective: alpha for objective, alpha in point.weights.items() if alpha}
        if weights:
            objective, alpha = _whose(weights)
            arm = "" if point.form == "dpo" else arm_base
            shown = None if point.form == "dpo" else alpha
            lines[name] = Line(point.method, objective, arm, shown, point.weights)
        elif name == sweep.control:
            lines[name] = Line("control", objectives[0], "", 0.0)
        else:
            lines[name] = Line("sharpened", objectives[0], "", point.sharpen)
    for entry in entries(methods or {}, sweep.points):
        if entry.mix:
            weights = {name: weight * entry.mix.strength for name, weight in entry.mix.weights.items()}
            objective, alpha = _whose(weights)
            lines[entry.name] = Line(entry.method, objective, arm_base, alpha, weights)
    best = f"best_of_{best_of}"
    return lines | {f"{best}/{name}": Line(best, name, "", None) for name in objectives}


def _whose(weights: Mapping[str, float]) -> tuple[str, float]:
    """The one objective that weights are of, empty for several, and their sum."""
    return "" if len(weights) > 1 else next(iter(weights)), round(sum(weights.values()), 6)


def table(
    rows: pd.DataFrame, named: Mapping[str, Line], objectives: Mapping[str, Objective], bootstrap: Bootstrap
) -> pd.DataFrame:
    """table.csv: one line per base and method, with intervals over prompts.

    Args:
        rows: what `judge_bases` returns, for all bases.
        named: the lines by the name of their rows, as `lines_of` returns them.
        objectives: of the run.
        bootstrap: of the intervals.
    """
    return pd.DataFrame(_lines(rows, named, objectives, bootstrap)).round(4)


def _lines(
    rows: pd.DataFrame, named: Mapping[str, Line], objectives: Mapping[str, Objective], bootstrap: Bootstrap
) -> Iterator[Row]:
    tuned = {line.objective: name for name, line in named.items() if line.method == "dpo"}
    control = next(name for name, line in named.items() if line.method == "control")
    for base, of_base in rows.groupby("base", sort=False):
        means = {
            name: of_base[of_base.point == name].groupby("prompt", sort=True)[list(objectives)].mean() for name in named
        }
        for name, line in named.items():
            of_line = of_base[of_base.point == name]
            row: Row = {"base": base, "method": line.method, "arm": line.arm, "alpha": line.alpha}
            if len(objectives) > 1:
                row |= {f"alpha_{objective}": line.weights.get(objective, 0.0) for objective in objectives}
                row["picked_by"] = line.objective if line.method.startswith("best_of") else ""
            intervals = {
                objective: bootstrap_mean(prompt_means(of_line, objective), bootstrap) for objective in objectives
            }
            for place, column in enumerate(("reward", "ci_low", "ci_high")):
                row |= {f"{column}_{objective}": interval[place] for objective, interval in intervals.items()}
            row["kl"] = of_line.kl.mean()
            row |= quality_columns(of_line, objectives, bootstrap)
            if "left_out" in of_line:  # of the base's mass, per token
                row["left_out"] = (of_line.left_out / of_line.n_tokens.sum()).sum(min_count=1)
            row["prompts"] = of_line.prompt.nunique()
            row |= dict.fromkeys(("gap_recovered", "gap_ci_low", "gap_ci_high"))
            upper = tuned.get(line.objective)
            if upper is not None and line.method not in ("control", "dpo"):
                three = [means[place][line.objective] for place in (name, control, upper)]
                guided_P, control_P, tuned_P = pd.concat(three, axis=1).dropna().to_numpy().T
                gap = gap_recovered(guided_P, control_P, tuned_P, bootstrap)
                if gap is None:
                    row["gap_recovered"] = UNDEFINED
                else:
                    row |= dict(zip(("gap_recovered", "gap_ci_low", "gap_ci_high"), gap, strict=True))
            yield row
