"""The default experiment at several seeds of sampling, training and generation, in float32, and on other machines.

    python -m tests.bench.seeds 1 2                  # beside the committed run, whose seed is params.yaml's
    python -m tests.bench.seeds --machine "a name"   # after `make repro` on another machine: its run, for comparison

The first runs `python -m pipeline sweep --multirun …` for what is not there yet and writes results/seeds/: table.csv
with a line for each seed and point, fronts.csv with a line for each seed, and in machines.csv the line of float32. The
second adds a line to machines.csv. README.md has means and ranges of both.
"""

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pandas as pd

from pipeline.config.load import load_params
from pipeline.data.files import replacing
from tests.bench.trials import keep

OUT, JOBS = Path("results/seeds"), Path("scratch/hydra/multirun")
SHOWN = ("readable", "ended", "words", "perplexity", "distinct_2", "distinct_2_within", "relevance", "kl")
FRONT = ("hypervolume", "hypervolume_controls", "readable_hypervolume", "readable_hypervolume_controls")


FLOAT32 = "models.smollm2-135m.dtype=float32"  # where the default is bfloat16: on CPUs that compute in it


def measured(folder: Path, seed: int) -> tuple[pd.DataFrame, dict[str, float]]:
    """The front of a run, and its metrics."""
    metrics = json.loads((folder / "pareto" / "metrics.json").read_text(encoding="utf-8"))
    line = {"seed": seed, **{name: metrics[name] for name in FRONT}, "mip": metrics["mip"]["genarm"]}
    line |= {f"spearman_{name}": value for name, value in metrics["spearman"]["genarm"].items()}
    line |= {f"held_out_accuracy_{name}": arm["accuracy"] for name, arm in metrics["arms"].items()}
    return pd.read_csv(folder / "pareto" / "front.csv").assign(seed=seed), line


def ranged(values: pd.Series, digits: int = 2) -> str:
    """Mean and range."""
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f}–{values.max():.{digits}f})"


def page(table: pd.DataFrame, fronts: pd.DataFrame, machines: pd.DataFrame, objectives: list[str]) -> str:
    """README.md."""
    scores = [*(f"score_{name}" for name in objectives), *(f"held_out_{name}" for name in objectives), *SHOWN]
    lines = [
        "# Three seeds" if len(fronts) == 3 else f"# {len(fronts)} seeds",
        "",
        "Written by `python -m tests.bench.seeds`: the default experiment with its responses sampled, its ARMs trained "
        "and its texts generated at each seed. Mean and, in brackets, range over the seeds. The last columns are the "
        "first seed in another precision or on another kind of processor, where other responses are sampled.",
        "",
        "| point | " + " | ".join(name.removeprefix("score_").replace("_", " ") for name in scores) + " |",
        "|---" * (len(scores) + 1) + "|",
    ]
    for point, own in table.groupby("point", sort=False):
        lines.append(f"| {point} | " + " | ".join(ranged(own[name]) for name in scores) + " |")
    columns = [*(f"seed {seed}" for seed in fronts.seed), "mean", *machines.machine]
    lines += ["", "| measure | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in fronts.columns.drop("seed"):
        values = [*fronts[name], fronts[name].mean(), *machines[name]]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    readable = fronts.readable_hypervolume
    spread = (readable.max() - readable.min()) / readable.mean()
    lines += ["", f"The readable hypervolume spreads by {spread:.0%} of its mean."]
    return "\n".join(lines) + "\n"


def add_machine(folder: Path, name: str) -> None:
    """Make the default's run in that folder a line of machines.csv, in the place of an earlier one of that name."""
    _, line = measured(folder, load_params().seed)
    keep(name, pd.DataFrame([{"machine": name, **line}]).round(4), OUT / "machines.csv", "machine")


def main() -> None:
    """Run what is not there yet, and write."""
    parser = ArgumentParser("python -m tests.bench.seeds")
    parser.add_argument("seeds", nargs="*", type=int)
    parser.add_argument("--machine", metavar="NAME", help="of the run in results/, which is not the committed one")
    options = parser.parse_args()
    params = load_params()
    if options.machine:
        add_machine(Path("results"), options.machine)
    else:
        for job in [*(f"seed={seed}" for seed in options.seeds), FLOAT32]:
            if not (JOBS / job / "pareto" / "metrics.json").exists():
                subprocess.run([sys.executable, "-m", "pipeline", "sweep", "--multirun", job], check=True)
        folders = {params.seed: Path("results")} | {seed: JOBS / f"seed={seed}" for seed in options.seeds}
        runs = [measured(folder, seed) for seed, folder in folders.items()]
        tables = {"table": pd.concat([front for front, _ in runs]), "fronts": pd.DataFrame([line for _, line in runs])}
        for name, found in tables.items():
            with replacing(OUT / f"{name}.csv") as stream:
                found.round(4).to_csv(stream, index=False)
        add_machine(JOBS / FLOAT32, "float32")
    table, fronts, machines = (pd.read_csv(OUT / f"{name}.csv") for name in ("table", "fronts", "machines"))
    with replacing(OUT / "README.md") as stream:
        stream.write(page(table, fronts, machines, list(params.objectives)))


if __name__ == "__main__":
    main()
