"""Figures, the terminal table and the self-contained HTML report."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape
from rich.console import Console
from rich.table import Table

from pipeline.config import Params
from pipeline.store import Row, replacing

INK, _GUIDED, _CONTROL = "#1f2a37", "#0b6e99", "#c2540a"
_SERIES = ("#0b6e99", "#c2540a", "#3f7d20", "#7a3e9d", "#8a6d00")
_SAMPLES = 12  # prompts shown side by side
_WINDOW = 5  # training steps averaged in a curve


def save(figure: plt.Figure, path: Path) -> None:
    """Write a PNG under its name only when it is complete; no date or version inside, so equal figures are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.png")
    try:
        figure.savefig(partial, dpi=150, bbox_inches="tight", metadata={"Software": None})
        partial.replace(path)
    finally:
        plt.close(figure)
        partial.unlink(missing_ok=True)


def label_axes(axes: plt.Axes, x_label: str, y_label: str) -> None:
    """What the axes show, on a light grid."""
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_front(front: pd.DataFrame, objectives: Sequence[str], control: str, path: Path) -> None:
    """Every pair of objectives as one panel: points with error bars, the guided sweep joined, controls apart."""
    pairs = [(x, y) for i, x in enumerate(objectives) for y in objectives[i + 1 :]] or [(objectives[0], "kl")]
    figure, panels = plt.subplots(1, len(pairs), figsize=(6.4 * len(pairs), 4.8), squeeze=False)
    for axes, (x, y) in zip(panels[0], pairs, strict=True):
        columns = f"score_{x}", (f"score_{y}" if y in objectives else y)
        if len(objectives) <= 2:
            for _, joined in front[front.method.str.startswith("genarm")].groupby("method"):
                line = joined.sort_values(f"alpha_{x}")
                axes.plot(line[columns[0]], line[columns[1]], color=_GUIDED, lw=1.2, alpha=0.6, zorder=1)
        for place, (_, line) in enumerate(front.iterrows()):
            colour = _CONTROL if line["method"] == "base" else _GUIDED
            errors = {
                side: [[line[f"score_{n}"] - line[f"ci_low_{n}"]], [line[f"ci_high_{n}"] - line[f"score_{n}"]]]
                for side, n in (("xerr", x), ("yerr", y))
                if n in objectives
            }
            axes.errorbar(
                line[columns[0]], line[columns[1]], **errors, fmt="s" if line["method"] == "base" else "o",
                color=colour, ms=7, capsize=3, lw=1, mfc=colour if line["on_front"] else "white",
            )  # fmt: skip
            axes.annotate(
                _label(line, objectives), (line[columns[0]], line[columns[1]]), xytext=(7, -13 if place % 2 else 7),
                textcoords="offset points", fontsize=8, color=INK,
            )  # fmt: skip
        label_axes(axes, x, y if y in objectives else "KL to the base, nats per response")
    panels[0][0].set_title(
        f"{front.base[0]}: circles are weight vectors, squares the base ({control} = control);\nfilled: on the front",
        fontsize=9, loc="left", color=INK,
    )  # fmt: skip
    save(figure, path)


def _label(line: pd.Series, objectives: Sequence[str]) -> str:
    """Weights of a guided point, the name of an unguided one."""
    if line["method"] == "base":
        return f"{line['point']} (T = {line['temperature']:g})"
    weights = ", ".join(f"{line[f'alpha_{name}']:g}" for name in objectives)
    kind = "" if line["method"] == "genarm" else f"{line['method'].removeprefix('genarm_').replace('_', '-')} "
    return f"{kind}α = ({weights})"


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


def draw_curves(curves: pd.DataFrame, path: Path) -> None:
    """Loss and pair accuracy against optimizer steps: lines are training, dots validation."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6))
    for colour, (objective, mine) in zip(_SERIES * 3, curves.groupby("objective", sort=False), strict=False):
        for axes, column in zip(panels, ("loss", "accuracy"), strict=True):
            train, held_out = mine[mine.phase == "train"], mine[mine.phase == "eval"]
            axes.plot(train.step, train[column], color=colour, lw=1.4, label=objective)
            axes.plot(held_out.step, held_out[column], "o", color=colour, ms=6)
    label_axes(panels[0], "step", "ARM loss")
    label_axes(panels[1], "step", "pair accuracy")
    if not curves.empty:
        panels[0].legend(frameon=False)
    save(figure, path)


def sample_table(scored: pd.DataFrame, points: Sequence[str]) -> list[Row]:
    """Responses of evenly spaced prompts, all points of a prompt together."""
    prompts = list(scored.prompt.unique())
    chosen = prompts[:: max(1, len(prompts) // _SAMPLES)][:_SAMPLES]
    first = scored[scored["sample"] == scored["sample"].min()]
    return [
        {
            "prompt": prompt,
            "responses": [
                first[(first.prompt == prompt) & (first.point == point)].iloc[0].to_dict() for point in points
            ],
        }
        for prompt in chosen
    ]


def write_html(
    params: Params, front: pd.DataFrame, wins: pd.DataFrame, metrics: Row, data: Row, scored: pd.DataFrame,
    pictures: Path, path: Path,
) -> None:  # fmt: skip
    """One file that opens from disk without a network: figures embedded, every value escaped."""
    values = {
        "params": params,
        "objectives": list(params.objectives),
        "front": front.to_dict("records"),
        "wins": {(row["point"], row["objective"]): row for row in wins.to_dict("records")},
        "metrics": metrics,
        "data": data,
        "samples": sample_table(scored, list(front.point)),
        "prompts": scored.prompt.nunique(),
        "pictures": {name: _embedded(pictures / f"{name}.png") for name in ("front", "curves")},
    }
    _write_page("report.html.j2", values, path)


def _embedded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


def _write_page(template: str, values: Row, path: Path) -> None:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]))
    html = environment.get_template(template).render(**values)
    with replacing(path) as stream:
        stream.write(html)


_METHODS = {
    "control": ("s", _CONTROL, "control"), "sharpened": ("s", "#e0a070", "sharpened"),
    "genarm": ("o", _GUIDED, "guided, plain"), "genarm_log_ratio": ("D", "#3f7d20", "guided, log-ratio"),
    "arm": ("x", "#6b7280", "the ARM alone"), "dpo": ("*", "#7a3e9d", "base tuned by DPO"),
    "best_of": ("^", "#8a6d00", "best of N, oracle"),
}  # fmt: skip


def draw_ladder(table: pd.DataFrame, objective: str, path: Path) -> None:
    """One panel per base: the reward of every method with its interval, against KL to that base."""
    bases = list(table.base.unique())
    figure, panels = plt.subplots(1, len(bases), figsize=(4.6 * len(bases), 4.6), sharey=True, squeeze=False)
    for axes, base in zip(panels[0], bases, strict=True):
        mine = table[table.base == base]
        level = mine[mine.method == "control"][f"reward_{objective}"].iloc[0]
        axes.axhline(level, color=_CONTROL, lw=0.8, ls=":", zorder=0)
        for method, (marker, colour, label) in _METHODS.items():
            part = mine[mine.method.str.startswith("best_of") if method == "best_of" else mine.method == method]
            if part.empty:
                continue
            part = part.sort_values("alpha")
            reward = part[f"reward_{objective}"]
            errors = [reward - part[f"ci_low_{objective}"], part[f"ci_high_{objective}"] - reward]
            joined = "-" if method.startswith("genarm") else "none"
            axes.errorbar(
                part.kl, reward, yerr=errors, marker=marker, ls=joined, color=colour, ms=11 if marker == "*" else 7,
                capsize=3, lw=1.2, label=label,
            )  # fmt: skip
            if method.startswith("genarm"):
                for _, line in part.iterrows():
                    axes.annotate(
                        f"α = {line.alpha:g}", (line.kl, line[f"reward_{objective}"]), xytext=(7, -12),
                        textcoords="offset points", fontsize=8, color=INK,
                    )  # fmt: skip
        axes.set_title(base, fontsize=10, loc="left", color=INK)
        label_axes(axes, "KL to the base, nats per response", objective if base == bases[0] else "")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    save(figure, path)


def write_ladder_html(
    params: Params, table: pd.DataFrame, rows: pd.DataFrame, ladder: Row, picture: Path, path: Path
) -> None:
    """The weak-to-strong page: what was asked, the models, the figure, the table and samples.

    Args:
        table: table.csv.
        rows: all scored rows, with `base`.
        ladder: facts of each model, as `fetch` wrote them.
        picture: the figure.
        path: of the page.
    """
    by_base = rows.assign(point=rows.base + " " + rows.point)
    points = list(by_base.point.unique())
    lines = table.astype(object).where(table.notna(), None).to_dict("records")
    values = {
        "params": params, "objectives": list(params.objectives), "weak": params.arm.base,
        "bases": params.weak_to_strong.bases, "ladder": ladder, "lines": lines,
        "best": f"best_of_{params.weak_to_strong.best_of}", "prompts": rows.prompt.nunique(),
        "samples": params.decoding.samples_per_prompt, "texts": sample_table(by_base, points),
        "picture": _embedded(picture),
    }  # fmt: skip
    _write_page("weak_to_strong.html.j2", values, path)


def write_comparison_html(
    params: Params, tables: Mapping[str, pd.DataFrame], rows: pd.DataFrame, pictures: Path, path: Path
) -> None:
    """The comparison's page: what is compared, figures, tables and samples.

    Args:
        tables: table, fronts, matched and wins, as in the files of those names.
        rows: all scored rows, with `line`.
        pictures: the folder of the figures.
        path: of the page.
    """
    points = rows.assign(point=rows.line)
    everywhere = points[
        points.prompt.isin(set.intersection(*(set(part.prompt) for _, part in points.groupby("point"))))
    ]
    shown = {name: found.astype(object).where(found.notna(), None).to_dict("records") for name, found in tables.items()}
    values = {
        "params": params, "objectives": list(params.objectives), "prompts": rows.prompt.nunique(), **shown,
        "methods": list(params.comparison.methods), "against": params.comparison.against,
        "won": {(line["method"], line["other"]): line for line in shown["wins"]},
        "texts": sample_table(everywhere, list(points.point.unique())),
        "pictures": {name: _embedded(pictures / f"{name}.png") for name in ("fronts", "reward_kl")},
    }  # fmt: skip
    _write_page("comparison.html.j2", values, path)


def print_comparison(fronts: pd.DataFrame) -> None:
    """fronts.csv in the terminal, best first."""
    shown = Table(title="Hypervolume of every method, its difference [interval], and mean inner product")
    for column in ("method", "hypervolume", "difference", "MIP", "prompts"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for line in fronts.sort_values("hypervolume", ascending=False).to_dict("records"):
        difference = f"{line['delta_hv']:+.3f} [{line['delta_ci_low']:+.3f}, {line['delta_ci_high']:+.3f}]"
        mip = f"{line['mip']:.3f}" if pd.notna(line["mip"]) else ""
        shown.add_row(line["method"], f"{line['hypervolume']:.3f}", difference, mip, str(line["prompts"]))
    Console().print(shown)


def print_front(front: pd.DataFrame, objectives: Sequence[str], metrics: Row) -> None:
    """The front in the terminal."""
    table = Table(title="Pareto sweep: score [interval], KL in nats per response, win rate against the control")
    for column in ("point", *objectives, "KL", *(f"wins {name}" for name in objectives), "front"):
        table.add_column(column, justify="left" if column == "point" else "right")
    for line in front.to_dict("records"):
        scores = [
            f"{line[f'score_{n}']:.2f} [{line[f'ci_low_{n}']:.2f}, {line[f'ci_high_{n}']:.2f}]" for n in objectives
        ]
        won = [f"{line[f'win_rate_{n}']:.2f}" for n in objectives]
        table.add_row(line["point"], *scores, f"{line['kl']:.1f}", *won, "yes" if line["on_front"] else "")
    console = Console()
    console.print(table)
    console.print(
        f"hypervolume {metrics['hypervolume']:.3f} (controls alone {metrics['hypervolume_controls']:.3f}), "
        f"on the front {metrics['n_front']} of {len(front)}"
    )


def print_ladder(table: pd.DataFrame, objectives: Sequence[str]) -> None:
    """The weak-to-strong table in the terminal."""
    shown = Table(title="Weak to strong: reward [interval], share of the gap to DPO recovered, KL in nats per response")
    for column in ("base", "method", "α", *objectives, "gap recovered", "KL", "tokens/s"):
        shown.add_column(column, justify="left" if column in ("base", "method") else "right")
    for line in table.to_dict("records"):
        rewards = [
            f"{line[f'reward_{n}']:.2f} [{line[f'ci_low_{n}']:.2f}, {line[f'ci_high_{n}']:.2f}]" for n in objectives
        ]
        gap, told = line["gap_recovered"], ""
        if isinstance(gap, str):
            told = "not defined"
        elif pd.notna(gap):
            told = f"{gap:.2f} [{line['gap_ci_low']:.2f}, {line['gap_ci_high']:.2f}]"
        alpha = f"{line['alpha']:g}" if pd.notna(line["alpha"]) else ""
        shown.add_row(
            line["base"], line["method"], alpha, *rewards, told, f"{line['kl']:.1f}", f"{line['tokens_per_s']:.0f}"
        )
    Console().print(shown)


if __name__ == "__main__":
    for name, file in (("report", "report/index.html"), ("front", "pareto/front.csv"), ("picture", "pareto/front.png")):
        found = Path("results") / file
        print(f"{name:8} {found if found.exists() else f'{found} is not there yet: run `make repro`'}")
    print("W&B      offline runs in scratch/wandb; `wandb sync scratch/wandb/offline-run-*` uploads them")
