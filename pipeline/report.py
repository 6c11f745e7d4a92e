"""Figures, the terminal table and the self-contained HTML report."""

import base64
from collections.abc import Sequence
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

_INK, _GUIDED, _CONTROL = "#1f2a37", "#0b6e99", "#c2540a"
_SERIES = ("#0b6e99", "#c2540a", "#3f7d20", "#7a3e9d", "#8a6d00")
_SAMPLES = 12  # prompts shown side by side
_WINDOW = 5  # training steps averaged in a curve


def _save(figure: plt.Figure, path: Path) -> None:
    """Write a PNG under its name only when it is complete; no date or version inside, so equal figures are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.png")
    try:
        figure.savefig(partial, dpi=150, bbox_inches="tight", metadata={"Software": None})
        partial.replace(path)
    finally:
        plt.close(figure)
        partial.unlink(missing_ok=True)


def _axes(axes: plt.Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_front(front: pd.DataFrame, objectives: Sequence[str], control: str, path: Path) -> None:
    """Every pair of objectives as one panel: points with error bars, the guided sweep joined, controls apart."""
    pairs = [(x, y) for i, x in enumerate(objectives) for y in objectives[i + 1 :]] or [(objectives[0], "kl")]
    figure, panels = plt.subplots(1, len(pairs), figsize=(6.4 * len(pairs), 4.8), squeeze=False)
    for axes, (x, y) in zip(panels[0], pairs, strict=True):
        columns = f"score_{x}", (f"score_{y}" if y in objectives else y)
        guided = front[front.method != "base"].sort_values(f"alpha_{x}")
        if len(objectives) == 2:
            axes.plot(guided[columns[0]], guided[columns[1]], color=_GUIDED, lw=1.2, alpha=0.6, zorder=1)
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
                textcoords="offset points", fontsize=8, color=_INK,
            )  # fmt: skip
        _axes(axes, x, y if y in objectives else "KL to the base, nats per response")
    panels[0][0].set_title(
        f"{front.base[0]}: circles are weight vectors, squares the base ({control} = control);\nfilled: on the front",
        fontsize=9, loc="left", color=_INK,
    )  # fmt: skip
    _save(figure, path)


def _label(line: pd.Series, objectives: Sequence[str]) -> str:
    """Weights of a guided point, the name of an unguided one."""
    if line["method"] == "base":
        return f"{line['point']} (T = {line['temperature']:g})"
    return "α = (" + ", ".join(f"{line[f'alpha_{name}']:g}" for name in objectives) + ")"


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
    return pd.concat(parts)


def draw_curves(curves: pd.DataFrame, path: Path) -> None:
    """Loss and pair accuracy against optimizer steps: lines are training, dots validation."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6))
    for colour, (objective, mine) in zip(_SERIES * 3, curves.groupby("objective", sort=False), strict=False):
        for axes, column in zip(panels, ("loss", "accuracy"), strict=True):
            train, held_out = mine[mine.phase == "train"], mine[mine.phase == "eval"]
            axes.plot(train.step, train[column], color=colour, lw=1.4, label=objective)
            axes.plot(held_out.step, held_out[column], "o", color=colour, ms=6)
    _axes(panels[0], "step", "ARM loss")
    _axes(panels[1], "step", "pair accuracy")
    panels[0].legend(frameon=False)
    _save(figure, path)


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
    params: Params, front: pd.DataFrame, wins: pd.DataFrame, metrics: Row, scored: pd.DataFrame, pictures: Path,
    path: Path,
) -> None:  # fmt: skip
    """One file that opens from disk without a network: figures embedded, every value escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]))
    embedded = {
        name: base64.b64encode((pictures / f"{name}.png").read_bytes()).decode() for name in ("front", "curves")
    }
    html = environment.get_template("report.html.j2").render(
        params=params,
        objectives=list(params.objectives),
        front=front.to_dict("records"),
        wins={(row["point"], row["objective"]): row for row in wins.to_dict("records")},
        metrics=metrics,
        samples=sample_table(scored, list(front.point)),
        prompts=scored.prompt.nunique(),
        pictures=embedded,
    )
    with replacing(path) as stream:
        stream.write(html)


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


if __name__ == "__main__":
    for name, file in (("report", "report/index.html"), ("front", "pareto/front.csv"), ("picture", "pareto/front.png")):
        found = Path("results") / file
        print(f"{name:8} {found if found.exists() else f'{found} is not there yet: run `make repro`'}")
    print("W&B      offline runs in scratch/wandb; `wandb sync scratch/wandb/offline-run-*` uploads them")
