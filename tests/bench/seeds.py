"""The default experiment at several seeds of sampling, training and generation, and in float32.

    python -m tests.bench.seeds 1 2        # beside the committed run, whose seed is params.yaml's

Runs `python -m pipeline sweep --multirun …` for what is not there yet and writes results/seeds/: table.csv with a line
for each seed and point, fronts.csv with a line for each seed, float32.csv with that of float32, and README.md with
means and ranges.
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


def page(table: pd.DataFrame, fronts: pd.DataFrame, float32: pd.DataFrame, objectives: list[str]) -> str:
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
    columns = [*(f"seed {seed}" for seed in fronts.seed), "mean", f"seed {fronts.seed.iloc[0]}, float32"]
    lines += ["", "| measure | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in fronts.columns.drop("seed"):
        values = [*fronts[name], fronts[name].mean(), *float32[name]]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    readable = fronts.readable_hypervolume
    spread = (readable.max() - readable.min()) / readable.mean()
    lines += ["", f"The readable hypervolume spreads by {spread:.0%} of its mean."]
    return "\n".join(lines) + "\n"


def main(seeds: list[int]) -> None:
    """Run what is not there yet, and write."""
    for job in [*(f"seed={seed}" for seed in seeds), FLOAT32]:
        if not (JOBS / job / "pareto" / "metrics.json").exists():
            subprocess.run([sys.executable, "-m", "pipeline", "sweep", "--multirun", job], check=True)
    params = load_params()
    runs = [measured(Path("results"), params.seed), *(measured(JOBS / f"seed={seed}", seed) for seed in seeds)]
    table, fronts = pd.concat([front for front, _ in runs]), pd.DataFrame([line for _, line in runs])
    float32 = pd.DataFrame([measured(JOBS / FLOAT32, params.seed)[1]])
    for name, found in (("table", table), ("fronts", fronts), ("float32", float32)):
        with replacing(OUT / f"{name}.csv") as stream:
            found.round(4).to_csv(stream, index=False)
    with replacing(OUT / "README.md") as stream:
        stream.write(page(table, fronts, float32, list(params.objectives)))


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]])
