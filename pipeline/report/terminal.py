"""Tables in the terminal: what a stage found, at its end."""

from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline.data.files import Row


def comparison(fronts: pd.DataFrame) -> None:
    """fronts.csv in the terminal, best first."""
    shown = Table(title="Hypervolume of every method, its difference \\[interval], and mean inner product")
    for column in ("method", "hypervolume", "difference", "p (Holm)", "MIP", "prompts"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    for line in fronts.sort_values("hypervolume", ascending=False).to_dict("records"):
        difference = f"{line['delta_hv']:+.3f} [{line['delta_ci_low']:+.3f}, {line['delta_ci_high']:+.3f}]"
        mip, p = (f"{line[column]:.3f}" if pd.notna(line[column]) else "" for column in ("mip", "p_holm"))
        shown.add_row(line["method"], f"{line['hypervolume']:.3f}", difference, p, mip, str(line["prompts"]))
    Console().print(shown)


def front(table: pd.DataFrame, objectives: Sequence[str], metrics: Row) -> None:
    """The front in the terminal."""
    shown = Table(title="Pareto sweep: score \\[interval], KL in nats per response, win rate against the control")
    for column in ("point", *objectives, "KL", "readable", *(f"wins {name}" for name in objectives), "front"):
        shown.add_column(column, justify="left" if column == "point" else "right")
    for line in table.to_dict("records"):
        scores = [
            f"{line[f'score_{n}']:.2f} [{line[f'ci_low_{n}']:.2f}, {line[f'ci_high_{n}']:.2f}]" for n in objectives
        ]
        won = [f"{line[f'win_rate_{n}']:.2f}" for n in objectives]
        costs = (f"{line['kl']:.1f}", f"{line['readable']:.2f}")
        shown.add_row(line["point"], *scores, *costs, *won, "yes" if line["on_front"] else "")
    console = Console()
    console.print(shown)
    console.print(
        f"hypervolume {metrics['hypervolume']:.3f} (controls alone {metrics['hypervolume_controls']:.3f}), "
        f"readable {metrics['readable_hypervolume']:.3f} ({metrics['readable_hypervolume_controls']:.3f}), "
        f"on the front {metrics['n_front']} of {len(table)}"
    )


def ladder(table: pd.DataFrame, objectives: Sequence[str]) -> None:
    """The weak-to-strong table in the terminal."""
    shown = Table(
        title="Weak to strong: reward \\[interval], share of the gap to DPO recovered, KL in nats per response"
    )
    for column in ("base", "method", "α", *objectives, "gap recovered", "KL"):
        shown.add_column(column, justify="left" if column in ("base", "method") else "right")
    for line in table.to_dict("records"):
        rewards = [
            f"{line[f'reward_{n}']:.2f} [{line[f'ci_low_{n}']:.2f}, {line[f'ci_high_{n}']:.2f}]" for n in objectives
        ]
        gap, shown_gap = line["gap_recovered"], ""
        if isinstance(gap, str):
            shown_gap = "not defined"
        elif pd.notna(gap):
            shown_gap = f"{gap:.2f} [{line['gap_ci_low']:.2f}, {line['gap_ci_high']:.2f}]"
        alpha = f"{line['alpha']:g}" if pd.notna(line["alpha"]) else ""
        shown.add_row(line["base"], line["method"], alpha, *rewards, shown_gap, f"{line['kl']:.1f}")
    Console().print(shown)
