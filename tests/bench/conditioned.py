"""One ARM for all mixes beside an ARM for each objective, over several seeds of sampling, training and generation.

    make params ARGS="experiment=conditioned seed=1" && dvc repro      # in a clone of its own for each seed
    python -m tests.bench.conditioned results/conditioned ../seed1/results/conditioned ../seed2/results/conditioned

Writes results/conditioned/seeds.csv: the fronts of each run and, as the run `all`, of the means over the runs, each
with the difference from GenARM and that from PARM; `end_<objective>` is the score where that objective alone is
weighed. Intervals resample prompts, not runs.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_dir

from pipeline.config.load import to_params
from pipeline.data.files import read_jsonl, replacing
from pipeline.generation.comparison import standings_of
from tests.tiny import ROOT

ALL = "all"


def main(folders: list[Path]) -> None:
    """Compare, print, write."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        params = to_params(compose("config", ["experiment=conditioned"]))
    runs = {}
    for folder in folders:
        rows = pd.DataFrame([row for _, row in read_jsonl(folder / "rows.jsonl")])
        (seed,) = rows.seed.unique()
        runs[str(seed)] = rows.assign(sample=seed)
    runs[ALL] = pd.concat(runs.values())
    parts = []
    for name, rows in runs.items():
        for against in ("genarm", "parm"):
            asked = replace(params, comparison=replace(params.comparison, against=against))
            standings = standings_of(asked, rows)
            fronts = standings.fronts().assign(run=name, against=against).set_index("method")
            for entry in standings.entries:
                for objective in entry.mix.weights if entry.mix and entry.front and len(entry.mix.weights) == 1 else ():
                    reward = rows[rows.line == entry.name][objective].mean()
                    fronts.loc[entry.method, f"end_{objective}"] = round(reward, 4)
            parts.append(fronts.reset_index())
    table = pd.concat(parts)[["run", "against", *parts[0].columns.drop(["run", "against"])]]
    print(table[table.run == ALL].to_string(index=False))
    with replacing(Path("results/conditioned/seeds.csv")) as stream:
        table.to_csv(stream, index=False)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
