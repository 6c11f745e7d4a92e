"""The figures: fronts, reward against KL, training curves, the ladder. One look per method, everywhere the same."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from pipeline.evaluation.standings import UNGUIDED
from pipeline.report import drawing
from pipeline.report.drawing import INK, Drawing, label_axes

GUIDED, CONTROL = "#0b6e99", "#c2540a"
KL_LABEL = "KL to the base, nats per response"
_SERIES = ("#0b6e99", "#c2540a", "#3f7d20", "#7a3e9d", "#8a6d00")
_COLOURS = (
    "#0b6e99", "#3f7d20", "#14a3a3", "#7a3e9d", "#c2540a", "#8a6d00", "#d1437a", "#e39bb8", "#6b7280", "#b91c1c",
    "#9a7b4f", "#5b6ee1", "#22c55e", "#f59e0b", "#38bdf8",
)  # fmt: skip
_MARKERS = "oDvPsX*hd^<>p8"  # one fewer than colours, so that a look comes back after 210 methods only
_SMALLEST, _LARGEST = 2.0, 7.5  # sizes of a point of which nothing is readable, and of one of which all is
_WINDOW = 5  # training steps averaged in a curve
_LADDER = {
    "control": ("s", CONTROL, "control"), "sharpened": ("s", "#e0a070", "sharpened"),
    "genarm": ("o", GUIDED, "guided, plain"), "genarm_log_ratio": ("D", "#3f7d20", "guided, log-ratio"),
    "arm": ("x", "#6b7280", "the ARM alone"), "dpo": ("*", "#7a3e9d", "base tuned by DPO"),
    "best_of": ("^", "#8a6d00", "best of N, by the judge"),
    "byte_proxy_tuning": ("v", "#2563a8", "log-ratio over bytes"),
}  # fmt: skip


def interval(line: Mapping[str, Any], objective: str, kind: str = "score") -> str:
    """An objective's score with its interval, in words."""
    low, high = line[f"ci_low_{objective}"], line[f"ci_high_{objective}"]
    return f"{objective} {line[f'{kind}_{objective}']:.2f} [{low:.2f}, {high:.2f}]"


def tooltip(name: str, line: Mapping[str, Any], objectives: Sequence[str], kind: str = "score") -> str:
    """What a point says when it is asked: its name, weights, scores, distance and readable share, a line each."""
    weights = ", ".join(f"{line[f'alpha_{objective}']:g}" for objective in objectives)
    scores = [interval(line, objective, kind) for objective in objectives]
    distance = [f"KL {line['kl']:.1f} nats"] if pd.notna(line["kl"]) else []
    legible = [f"{line['readable']:.2f} readable"] if pd.notna(line.get("readable")) else []
    return "\n".join([name, f"α = ({weights})", *scores, *distance, *legible])


def _errors(table: pd.DataFrame, objective: str, kind: str = "score") -> list[pd.Series]:
    value = table[f"{kind}_{objective}"]
    return [value - table[f"ci_low_{objective}"], table[f"ci_high_{objective}"] - value]


def front(table: pd.DataFrame, objectives: Sequence[str], control: str, knee: str | None = None) -> Drawing:
    """Every pair of objectives as one panel: points with error bars, the guided sweep joined, controls apart.

    A point is as large as the share of its responses that one can read; the knee has a ring.
    """
    pairs = list(combinations(objectives, 2)) or [(objectives[0], "kl")]
    drawn = drawing.new(
        "front", 6.4 * len(pairs), 4.8,
        f"Scores of {len(table)} points on {' and '.join(objectives)} with error bars, as in the table.",
    )  # fmt: skip
    panels = drawn.panels(len(pairs))
    for axes, (x, y) in zip(panels, pairs, strict=True):
        columns = f"score_{x}", (f"score_{y}" if y in objectives else y)
        if len(objectives) <= 2:
            for _, joined in table[table.method.str.startswith("genarm")].groupby("method"):
                line = joined.sort_values(f"alpha_{x}")
                axes.plot(line[columns[0]], line[columns[1]], color=GUIDED, lw=1.2, alpha=0.6, zorder=1)
        for place in range(len(table)):
            one = table.iloc[[place]]
            line = one.iloc[0]
            bars: dict[str, Any] = {
                side: _errors(one, name) for side, name in (("xerr", x), ("yerr", y)) if name in objectives
            }
            unguided = line["method"] == "base"
            colour = CONTROL if unguided else GUIDED
            shown = axes.errorbar(
                one[columns[0]], one[columns[1]], **bars, fmt="s" if unguided else "o", color=colour,
                ms=_SMALLEST + (_LARGEST - _SMALLEST) * line["readable"], capsize=3, lw=1,
                mfc=colour if line["on_front"] else "white",
            )  # fmt: skip
            drawn.add_tooltips(shown, [tooltip(line["point"], line, objectives)], [line["point"]])
            if line["point"] == knee:
                axes.plot(
                    one[columns[0]], one[columns[1]], "o", ms=2 * _LARGEST, mfc="none", mec=colour, lw=1, zorder=1
                )
            axes.annotate(
                _label(line, objectives), (line[columns[0]], line[columns[1]]), xytext=(7, -13 if place % 2 else 7),
                textcoords="offset points", fontsize=8, color=INK,
            )  # fmt: skip
        label_axes(axes, x, y if y in objectives else KL_LABEL)
    panels[0].set_title(
        f"{table.base[0]}: circles are weight vectors, squares the base ({control} = control);\n"
        f"filled: on the front; size: share of readable responses{'; ring: the knee' if knee else ''}",
        fontsize=9, loc="left", color=INK,
    )  # fmt: skip
    return drawn


def _label(line: pd.Series, objectives: Sequence[str]) -> str:
    """Weights of a guided point, the name of an unguided one."""
    if line["method"] == "base":
        return f"{line['point']} (T = {line['temperature']:g})"
    weights = ", ".join(f"{line[f'alpha_{name}']:.2g}" for name in objectives)
    kind = "" if line["method"] == "genarm" else f"{line['method'].removeprefix('genarm_').replace('_', '-')} "
    return f"{kind}α = ({weights})"


def reward_kl(table: pd.DataFrame, objectives: Sequence[str]) -> Drawing:
    """One panel per objective: the score of every point against its distance from the base."""
    drawn = drawing.new(
        "reward_kl", 5.4 * len(objectives), 4.2,
        "The score of every point against its KL to the base, one panel per objective, as in the table.",
    )  # fmt: skip
    for axes, name in zip(drawn.panels(len(objectives)), objectives, strict=True):
        for unguided, rows in table.groupby(table.method == "base"):
            shown = axes.errorbar(
                rows.kl, rows[f"score_{name}"], yerr=_errors(rows, name), fmt="s" if unguided else "o", ms=7, lw=1,
                color=CONTROL if unguided else GUIDED, capsize=3, ls="none",
            )  # fmt: skip
            drawn.add_tooltips(shown, [tooltip(line["point"], line, objectives) for line in rows.to_dict("records")])
        for place, line in enumerate(table.sort_values("kl").to_dict("records")):
            alpha = line[f"alpha_{name}"]
            text = line["point"] if line["method"] == "base" else f"α = {alpha:g}"
            axes.annotate(
                text, (line["kl"], line[f"score_{name}"]), xytext=(7, -13 if place % 2 else 7),
                textcoords="offset points", fontsize=8, color=INK,
            )  # fmt: skip
        label_axes(axes, KL_LABEL, name)
    drawn.figure.tight_layout()
    return drawn


def curve_table(curves: pd.DataFrame) -> pd.DataFrame:
    """Training curves as `objective, phase, step, loss, accuracy`; training steps as running means."""
    parts = []
    for (objective, phase), part in curves.groupby(["objective", "phase"], sort=False):
        window = _WINDOW if phase == "train" else 1
        smooth = part[["loss", "rewards/accuracies"]].rolling(window, min_periods=1).mean().round(4)
        parts.append(
            pd.DataFrame(
                {
                    "objective": objective,
                    "phase": phase,
                    "step": part.step,
                    "loss": smooth.loss,
                    "accuracy": smooth["rewards/accuracies"],
                }
            )
        )
    return pd.concat(parts) if parts else pd.DataFrame(columns=["objective", "phase", "step", "loss", "accuracy"])


def curves(table: pd.DataFrame) -> Drawing:
    """Loss and pair accuracy against optimizer steps: lines are training, dots validation."""
    drawn = drawing.new(
        "curves", 10, 3.6, "Training and validation loss and pair accuracy of each reward model over optimizer steps."
    )
    panels = drawn.panels(2)
    for colour, (objective, of_objective) in zip(_SERIES * 3, table.groupby("objective", sort=False), strict=False):
        for axes, column in zip(panels, ("loss", "accuracy"), strict=True):
            train, held_out = of_objective[of_objective.phase == "train"], of_objective[of_objective.phase == "eval"]
            axes.plot(train.step, train[column], color=colour, lw=1.4, label=objective)
            dots = axes.errorbar(held_out.step, held_out[column], fmt="o", color=colour, ms=6)
            lines = zip(held_out.step, held_out[column], strict=True)
            drawn.add_tooltips(
                dots, [f"{objective}\nvalidation {column} {value:.3f}\nafter {step} steps" for step, value in lines]
            )
    label_axes(panels[0], "step", "ARM loss")
    label_axes(panels[1], "step", "pair accuracy")
    if not table.empty:
        panels[0].legend(frameon=False, labelcolor=INK)
    return drawn


def ladder(table: pd.DataFrame, objectives: Sequence[str]) -> Drawing:
    """One panel per base and objective: the reward of every method with its interval, against KL to that base."""
    shown = [(base, objective) for base in table.base.unique() for objective in objectives]
    drawn = drawing.new(
        "ladder", 4.6 * len(shown), 4.6,
        "For each base, reward against KL for the control, guidance, DPO and best-of-N, as in the table.",
    )  # fmt: skip
    panels = drawn.panels(len(shown), sharey=len(objectives) == 1)
    for axes, (base, objective) in zip(panels, shown, strict=True):
        rows = table[table.base == base]
        if "picked_by" in rows:
            rows = rows[rows.picked_by.fillna("").isin(["", objective])]
        level = rows[rows.method == "control"][f"reward_{objective}"].iloc[0]
        axes.axhline(level, color=CONTROL, lw=0.8, ls=":", zorder=0)
        for method, (marker, colour, label) in _LADDER.items():
            part = rows[rows.method.str.startswith("best_of") if method == "best_of" else rows.method == method]
            if not part.empty:
                weight = f"alpha_{objective}" if f"alpha_{objective}" in part else "alpha"
                _steps(drawn, axes, part.sort_values([weight, "alpha"]), objective, (marker, colour, label))
        axes.set_title(base, fontsize=10, loc="left", color=INK)
        label_axes(axes, KL_LABEL, objective if len(objectives) > 1 or (base, objective) == shown[0] else "")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.figure.legend(
        handles, labels, loc="upper center", ncol=len(labels), frameon=False, fontsize=9, labelcolor=INK
    )
    drawn.figure.tight_layout(rect=(0, 0, 1, 0.93))
    return drawn


def _strength(line: Mapping[Any, Any]) -> str:
    """A line's α; where there are several objectives, each one's."""
    each = [f"{value:g}" for name, value in line.items() if str(name).startswith("alpha_")]
    return ", ".join(each) if each and line["method"].startswith("genarm") else f"{line['alpha']:g}"


def _steps(drawn: Drawing, axes: Axes, part: pd.DataFrame, objective: str, look: tuple[str, str, str]) -> None:
    """One method's strengths on one base."""
    marker, colour, label = look
    guided = part.method.iloc[0].startswith("genarm")
    shown = axes.errorbar(
        part.kl, part[f"reward_{objective}"], yerr=_errors(part, objective, "reward"), marker=marker,
        ls="-" if guided else "none", color=colour, ms=11 if marker == "*" else 7, capsize=3, lw=1.2, label=label,
    )  # fmt: skip
    lines = part.to_dict("records")
    strengths = [f" α = {_strength(line)}" if pd.notna(line["alpha"]) else "" for line in lines]
    words = [f"{interval(line, objective, 'reward')}\nKL {line['kl']:.1f} nats" for line in lines]
    drawn.add_tooltips(shown, [f"{label}{alpha}\n{word}" for alpha, word in zip(strengths, words, strict=True)])
    for line in lines if guided else ():
        axes.annotate(
            f"α = {_strength(line)}", (line["kl"], line[f"reward_{objective}"]), xytext=(7, -12),
            textcoords="offset points", fontsize=8, color=INK,
        )  # fmt: skip


def _styles(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    methods = [method for method in table.method.unique() if method != UNGUIDED]
    styles: dict[str, dict[str, Any]] = {
        method: {"color": _COLOURS[place % len(_COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}
        for place, method in enumerate(methods)
    }
    return {UNGUIDED: {"color": "#9ca3af", "marker": "s"}, **styles}


def fronts(table: pd.DataFrame, objectives: Sequence[str]) -> Drawing:
    """Every pair of objectives as one panel: each method's points at its first strength, joined by their weights."""
    pairs = list(combinations(objectives, 2)) or [(objectives[0], objectives[0])]
    full = table.drop_duplicates(["method", "point"])  # of each method and point the first, as `entries` orders them
    drawn = drawing.new(
        "fronts", 8.5 * len(pairs), 6,
        "Scores of every method at every weight vector with error bars. The tables hold the same numbers.",
    )  # fmt: skip
    panels = drawn.panels(len(pairs))
    for axes, (x, y) in zip(panels, pairs, strict=True):
        for method, style in _styles(table).items():
            points = full[full.method == method].sort_values(f"alpha_{x}")
            joined = "none" if method == UNGUIDED or len(objectives) > 2 else "-"
            shown = axes.errorbar(
                points[f"reward_{x}"], points[f"reward_{y}"], xerr=_errors(points, x, "reward"),
                yerr=_errors(points, y, "reward"), ls=joined, lw=1.1, ms=7, elinewidth=0.5, alpha=0.9, label=method,
                **style,
            )  # fmt: skip
            texts = [tooltip(method, line, objectives, "reward") for line in points.to_dict("records")]
            drawn.add_tooltips(shown, texts)
        label_axes(axes, x, y)
    drawing.legend(drawn, panels[0])
    return drawn


def rewards_kl(table: pd.DataFrame, objectives: Sequence[str]) -> Drawing:
    """One panel per objective: reward against KL to the base, at the points that weigh the objective alone."""
    drawn = drawing.new(
        "rewards_kl", 6.5 * len(objectives), 5.5,
        "Reward against KL to the base for every method. The table of matched KL holds the same numbers.",
    )  # fmt: skip
    panels = drawn.panels(len(objectives))
    for axes, name in zip(panels, objectives, strict=True):
        others = [f"alpha_{other}" for other in objectives if other != name]
        alone = table[(table[others] == 0).all(axis=1) & table.kl.notna()]
        start = table[table.method == UNGUIDED].iloc[0]
        for method, style in _styles(table).items():
            points = alone[alone.method == method]
            points = points[points[f"alpha_{name}"] > 0] if method != UNGUIDED else points
            points = points.sort_values("kl")
            reward = points[f"reward_{name}"]
            shown = axes.errorbar(
                points.kl, reward, yerr=_errors(points, name, "reward"), ls="none", ms=7, capsize=2, elinewidth=0.7,
                label=method, **style,
            )  # fmt: skip
            texts = [tooltip(method, line, objectives, "reward") for line in points.to_dict("records")]
            drawn.add_tooltips(shown, texts)
            if method != UNGUIDED:
                axes.plot([start.kl, *points.kl], [start[f"reward_{name}"], *reward], lw=1, color=style["color"])
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=-0.1)
        label_axes(axes, KL_LABEL, name)
    drawing.legend(drawn, panels[0])
    return drawn
