"""Figures of a comparison: one colour and one marker per method, everywhere the same."""

from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from pipeline.comparison import BASE
from pipeline.config import Params
from pipeline.report import INK, label_axes, save

_COLOURS = (
    "#0b6e99", "#3f7d20", "#14a3a3", "#7a3e9d", "#c2540a", "#8a6d00", "#d1437a", "#e39bb8", "#4b5563", "#b91c1c",
    "#9a7b4f", "#5b6ee1", "#22c55e", "#f59e0b",
)  # fmt: skip
_MARKERS = "oDvPsX*hd^<>p8"


def _styles(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    methods = [method for method in table.method.unique() if method != BASE]
    styles = {
        method: {"color": _COLOURS[place % len(_COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}
        for place, method in enumerate(methods)
    }
    return {BASE: {"color": "#9ca3af", "marker": "s"}, **styles}


def draw_fronts(params: Params, table: pd.DataFrame, path: Path) -> None:
    """Every pair of objectives as one panel: each method's points at its first strength, joined by their weights."""
    objectives = list(params.objectives)
    pairs = list(combinations(objectives, 2)) or [(objectives[0], objectives[0])]
    full = _at_full_strength(table)
    figure, panels = plt.subplots(1, len(pairs), figsize=(8.5 * len(pairs), 6), squeeze=False)
    for axes, (x, y) in zip(panels[0], pairs, strict=True):
        for method, style in _styles(table).items():
            mine = full[full.method == method].sort_values(f"alpha_{x}")
            errors = {
                side: [mine[f"reward_{n}"] - mine[f"ci_low_{n}"], mine[f"ci_high_{n}"] - mine[f"reward_{n}"]]
                for side, n in (("xerr", x), ("yerr", y))
            }
            joined = "none" if method == BASE or len(objectives) > 2 else "-"
            axes.errorbar(
                mine[f"reward_{x}"], mine[f"reward_{y}"], **errors, ls=joined, lw=1.1, ms=7, elinewidth=0.5, alpha=0.9,
                label=method, **style,
            )  # fmt: skip
        label_axes(axes, x, y)
    _legend(figure, panels[0][0])
    save(figure, path)


def draw_reward_kl(params: Params, table: pd.DataFrame, path: Path) -> None:
    """One panel per objective: reward against KL to the base, at the points that weigh the objective alone."""
    objectives = list(params.objectives)
    figure, panels = plt.subplots(1, len(objectives), figsize=(6.5 * len(objectives), 5.5), squeeze=False)
    for axes, name in zip(panels[0], objectives, strict=True):
        others = [f"alpha_{other}" for other in objectives if other != name]
        alone = table[(table[others] == 0).all(axis=1) & table.kl.notna()]
        start = table[table.method == BASE].iloc[0]
        for method, style in _styles(table).items():
            mine = alone[alone.method == method]
            mine = mine[mine[f"alpha_{name}"] > 0] if method != BASE else mine
            mine = mine.sort_values("kl")
            reward = mine[f"reward_{name}"]
            errors = [reward - mine[f"ci_low_{name}"], mine[f"ci_high_{name}"] - reward]
            axes.errorbar(
                mine.kl, reward, yerr=errors, ls="none", ms=7, capsize=2, elinewidth=0.7, label=method, **style
            )  # fmt: skip
            if method != BASE:
                axes.plot([start.kl, *mine.kl], [start[f"reward_{name}"], *reward], lw=1, color=style["color"])
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=-0.1)
        label_axes(axes, "KL to the base, nats per response", name)
    _legend(figure, panels[0][0])
    save(figure, path)


def _at_full_strength(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of the fronts: of each method and point the first, as `entries` orders them."""
    return table.drop_duplicates(["method", "point"])


def _legend(figure: plt.Figure, axes: plt.Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, labelcolor=INK
    )
    figure.tight_layout()
