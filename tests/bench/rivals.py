"""Trials of rivals on validation prompts: their settings, chosen with the care that ARMs got.

    python -m tests.bench.rivals parm beta=5,lr=1e-3 beta=2,lr=5e-4
    python -m tests.bench.rivals fudge lr=1e-3,scale=1 lr=1e-3,scale=4

After `make repro`. Trains what a method needs at every β and learning rate on the pairs of the default, below
scratch/trials/rivals/, and answers the *validation* prompts at the ends and in the middle, GenARM beside it. Each of
the settings is a line of results/trials/rivals.csv, the best readable hypervolume first; README.md beside it shows
them. Test prompts and held-out scorers are not looked at.
"""

import time
from argparse import ArgumentParser
from pathlib import Path

import pandas as pd
from filelock import FileLock

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl
from pipeline.evaluation.judging import scored_frame
from pipeline.generation.comparison import generate, open_comparing_judge, standings_of, training_cost
from pipeline.stages import tune
from tests.bench import trials
from tests.bench.scratch import machine

FOLDER = trials.SCRATCH / "rivals"
RIVALS = {  # what each method is trained as, below `tune.rivals`
    "mod": ("positivity", "conciseness"),
    "parm": ("parm",),
    "uniarm": ("uniarm",),
    "fudge": ("prefix_positivity", "prefix_conciseness"),
    "controlled_decoding": ("prefix_positivity", "prefix_conciseness"),
}
KEYS = ("beta", "lr", "scale")  # of training, of training, of decoding
Settings = dict[str, float]


def composed(method: str, settings: Settings) -> Params:
    """The comparison of GenARM with a method at the ends and in the middle, on the default's prompts."""
    experiment = ["experiment=comparison", "sweep=ends", f"methods@comparison.methods=[genarm,{method}]"]
    changes = [
        f"comparison.methods.{method}.{key}={value}" if key == "scale" else f"tune.rivals.{name}.{key}={value}"
        for name in RIVALS[method]
        for key, value in settings.items()
    ]
    prompts = ["data.prompts=pipeline/data/prompts/everyday.jsonl", "comparison.prompts=null"]
    params, _ = trials.composed([*experiment, *changes, *prompts])
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


def trial(method: str, settings: Settings) -> pd.DataFrame:
    """The fronts of GenARM and a method at its settings, and how the method's ends and middle read."""
    params = composed(method, settings)
    trained = [f"{settings[key]:g}" for key in ("beta", "lr") if key in settings]
    workspace = workspace_of(FOLDER / "-".join([RIVALS[method][0], *trained]))
    for name in RIVALS[method]:
        if not workspace.rival(params.base, name).exists():
            tune.run(params, workspace, params.base, name)
    prompts = [row["prompt"] for _, row in read_jsonl(Path(params.data.prompts)) if row["split"] == "validation"]
    rows = generate(params, workspace, prompts, open_comparing_judge(params, workspace))
    scored = scored_frame(rows, params.objectives)
    standings = standings_of(params, scored)
    fronts = standings.fronts().set_index("method")
    table = standings.table(training_cost(params, workspace))
    lines = []
    for name, own in (("genarm", {}), (method, settings)):
        line: dict[str, object] = {"method": name, **{key: own.get(key) for key in KEYS}}
        line |= {"machine": machine()} | fronts.loc[name, ["hypervolume", "readable_hypervolume"]].to_dict()
        for point in trials.EVEN_AND_ENDS:
            found = table[(table.method == name) & (table.point == point)].iloc[0]
            columns = ("reward_positivity", "reward_conciseness", "kl", "readable", "perplexity")
            line |= {f"{column}_{point}": found[column] for column in columns}
        lines.append(line)
    table = pd.DataFrame(lines)
    return table.round({column: 4 for column in table if column not in KEYS})


def settings_of(text: str) -> Settings:
    """Settings as in beta=0.1,lr=5e-4."""
    found = {key: float(value) for key, value in (part.split("=") for part in text.split(","))}
    if unknown := found.keys() - set(KEYS):
        raise ValueError(f"{min(unknown)} is none of {', '.join(KEYS)}")
    return found


def main() -> None:
    """Try some settings of a method."""
    parser = ArgumentParser("python -m tests.bench.rivals")
    parser.add_argument("method", choices=RIVALS)
    parser.add_argument("settings", nargs="+", type=settings_of, metavar="KEY=VALUE,...", help=f"of {', '.join(KEYS)}")
    options = parser.parse_args()
    started, file = time.monotonic(), trials.OUT / "rivals.csv"
    for settings in options.settings:
        lines = trial(options.method, settings)
        print(lines.to_string(index=False), f"{time.monotonic() - started:.0f} s", sep="\n", flush=True)
        with FileLock(f"{FOLDER}.lock"):  # several may be tried at once
            kept = pd.concat([pd.read_csv(file), lines]) if file.exists() else lines
            kept = kept.drop_duplicates(["method", *KEYS, "machine"], keep="last")
            with trials.replacing(file) as stream:
                kept.sort_values("readable_hypervolume", ascending=False).to_csv(stream, index=False)
            trials.write_page()


if __name__ == "__main__":
    main()
