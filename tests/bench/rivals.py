"""Trials of rivals on validation prompts: β and learning rate of DPO and PARM, chosen with the care that ARMs got.

    python -m tests.bench.rivals METHOD BETA,LR [BETA,LR ...]

After `make repro`. Trains what METHOD (mod or parm) needs at every β and learning rate on the pairs of the default,
below scratch/trials/rivals/, and answers the *validation* prompts at the ends and in the middle, GenARM beside it. Each
pair of settings is a line of results/trials/rivals.csv, the best readable hypervolume first; README.md beside it shows
them. Test prompts and held-out scorers are not looked at.
"""

import time
from argparse import ArgumentParser
from pathlib import Path

import pandas as pd

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl
from pipeline.evaluation.judging import scored_frame
from pipeline.generation.comparison import generate, open_comparing_judge, standings_of, training_cost
from pipeline.stages import tune
from tests.bench import trials

FOLDER = trials.SCRATCH / "rivals"
KIND = {"mod": "dpo", "parm": "parm"}


def composed(method: str, beta: float, lr: float) -> Params:
    """The comparison of GenARM with a method at the ends and in the middle, on the default's prompts."""
    experiment = ["experiment=comparison", "sweep=ends", f"methods@comparison.methods=[genarm,{method}]"]
    names = {"mod": ("positivity", "conciseness"), "parm": ("parm",)}[method]
    settings = [f"tune.rivals.{name}.{key}={value}" for name in names for key, value in (("beta", beta), ("lr", lr))]
    prompts = ["data.prompts=pipeline/data/prompts/everyday.jsonl", "comparison.prompts=null"]
    params, _ = trials.composed([*experiment, *settings, *prompts])
    return params


def workspace_of(folder: Path) -> Workspace:
    """A workspace whose rivals are its own, and whose base, ARMs and pairs are those of the default."""
    own, default = Workspace(folder / "models", folder / "results"), Workspace()
    links = {own.models / name: default.models / name for name in ("smollm2-135m", "classifiers.json")}
    links |= {own.arm(name): default.arm(name) for name in ("positivity", "conciseness")}
    links |= {own.results / name: default.results / name for name in ("prepare", "train")}
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(target.absolute())
    return own


def trial(method: str, beta: float, lr: float) -> pd.DataFrame:
    """The fronts of GenARM and a method at its settings, and how the method's ends and middle read."""
    params = composed(method, beta, lr)
    workspace = workspace_of(FOLDER / f"{method}-{beta:g}-{lr:g}")
    for name, rival in params.tune.rivals.items():
        needed = rival.kind == KIND[method] and (method == "parm" or name in params.objectives)
        if needed and not workspace.rival(params.base, name).exists():
            tune.run(params, workspace, params.base, name)
    prompts = [row["prompt"] for _, row in read_jsonl(Path(params.data.prompts)) if row["split"] == "validation"]
    rows = generate(params, workspace, prompts, open_comparing_judge(params, workspace))
    scored = scored_frame(rows, params.objectives)
    standings = standings_of(params, scored)
    fronts = standings.fronts().set_index("method")
    table = standings.table(training_cost(params, workspace))
    lines = []
    for name, settings in (("genarm", (None, None)), (method, (beta, lr))):
        line: dict[str, object] = {"method": name, "beta": settings[0], "lr": settings[1]}
        line |= fronts.loc[name, ["hypervolume", "readable_hypervolume"]].to_dict()
        for point in trials.EVEN_AND_ENDS:
            found = table[(table.method == name) & (table.point == point)].iloc[0]
            columns = ("reward_positivity", "reward_conciseness", "kl", "readable", "perplexity")
            line |= {f"{column}_{point}": found[column] for column in columns}
        lines.append(line)
    table = pd.DataFrame(lines)
    return table.round({column: 4 for column in table if column not in ("beta", "lr")})


def settings_of(text: str) -> tuple[float, float]:
    """β and learning rate, as in 0.1,5e-4."""
    beta, lr = map(float, text.split(","))
    return beta, lr


def main() -> None:
    """Try some settings of a method."""
    parser = ArgumentParser("python -m tests.bench.rivals")
    parser.add_argument("method", choices=KIND)
    parser.add_argument("settings", nargs="+", type=settings_of, metavar="BETA,LR")
    options = parser.parse_args()
    started, file = time.monotonic(), trials.OUT / "rivals.csv"
    for beta, lr in options.settings:
        lines = trial(options.method, beta, lr)
        print(lines.to_string(index=False), f"{time.monotonic() - started:.0f} s", sep="\n", flush=True)
        kept = pd.concat([pd.read_csv(file), lines]) if file.exists() else lines
        kept = kept.drop_duplicates(["method", "beta", "lr"], keep="last")
        with trials.replacing(file) as stream:
            kept.sort_values("readable_hypervolume", ascending=False).to_csv(stream, index=False)
    trials.write_page()


if __name__ == "__main__":
    main()
