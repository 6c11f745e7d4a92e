"""The default experiment at several seeds of sampling, training and generation.

    python -m tests.bench.seeds 1 2        # beside the committed run, whose seed is params.yaml's

Runs `python -m pipeline sweep --multirun seed=…` and writes results/seeds/: table.csv with a line for each seed and
point, fronts.csv with a line for each seed, and README.md with means and ranges.
"""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

from pipeline.config.load import load_params
from pipeline.data.files import replacing

OUT, JOBS = Path("results/seeds"), Path("scratch/hydra/multirun")
SHOWN = ("readable", "ended", "words", "perplexity", "distinct_2", "distinct_2_within", "relevance", "kl")
FRONT = ("hypervolume", "hypervolume_controls", "readable_hypervolume", "readable_hypervolume_controls")


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


def page(table: pd.DataFrame, fronts: pd.DataFrame, objectives: list[str]) -> str:
    """README.md."""
    scores = [*(f"score_{name}" for name in objectives), *(f"held_out_{name}" for name in objectives), *SHOWN]
    lines = [
        "# Three seeds" if len(fronts) == 3 else f"# {len(fronts)} seeds",
        "",
        "Written by `python -m tests.bench.seeds`: the default experiment with its responses sampled, its ARMs trained "
        "and its texts generated at each seed. Mean and, in brackets, range over the seeds.",
        "",
        "| point | " + " | ".join(name.removeprefix("score_").replace("_", " ") for name in scores) + " |",
        "|---" * (len(scores) + 1) + "|",
    ]
    for point, own in table.groupby("point", sort=False):
        lines.append(f"| {point} | " + " | ".join(ranged(own[name]) for name in scores) + " |")
    lines += ["", "| measure | " + " | ".join(f"seed {seed}" for seed in fronts.seed) + " | mean |"]
    lines.append("|---" * (len(fronts) + 2) + "|")
    for name in fronts.columns.drop("seed"):
        values = " | ".join(f"{value:.3f}" for value in fronts[name])
        lines.append(f"| {name.replace('_', ' ')} | {values} | {fronts[name].mean():.3f} |")
    spread = (
        fronts.readable_hypervolume.max() - fronts.readable_hypervolume.min()
    ) / fronts.readable_hypervolume.mean()
    lines += ["", f"The readable hypervolume spreads by {spread:.0%} of its mean."]
    return "\n".join(lines) + "\n"


def main(seeds: list[int]) -> None:
    """Run what is not there yet, and write."""
    missing = [seed for seed in seeds if not (JOBS / f"seed={seed}" / "pareto" / "metrics.json").exists()]
    if missing:
        job = ["-m", "pipeline", "sweep", "--multirun", f"seed={','.join(map(str, missing))}"]
        subprocess.run([sys.executable, *job], check=True)
    params = load_params()
    runs = [measured(Path("results"), params.seed), *(measured(JOBS / f"seed={seed}", seed) for seed in seeds)]
    table, fronts = pd.concat([front for front, _ in runs]), pd.DataFrame([line for _, line in runs])
    objectives = list(params.objectives)
    for name, found in (("table", table), ("fronts", fronts)):
        with replacing(OUT / f"{name}.csv") as stream:
            found.round(4).to_csv(stream, index=False)
    with replacing(OUT / "README.md") as stream:
        stream.write(page(table, fronts, objectives))


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]])
