"""Trials on validation prompts: what was tried before a default was chosen, and what each gave.

    python -m tests.bench.trials NAME [HYDRA OVERRIDE ...]
    python -m tests.bench.trials lr_1e-3 --table results/weak_to_strong/trials.csv experiment=weak_to_strong \\
        data.prompts='${data.path}' weak_to_strong=none tune=none '~sweep.points.dpo' trainer.lr=1.0e-3

A trial is a composition of conf/ with overrides. It samples and trains below scratch/trials/, in one folder for all
trials whose options agree up to training, generates the *validation* prompts at every point of the sweep, and writes a
line for each point to results/trials/table.csv (in the place of an earlier trial of that name), with the first texts in
results/trials/texts.csv; README.md there shows the table. With `--table` the lines are all that is written. Test
prompts and held-out scorers are not looked at.
"""

import time
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.config.load import to_params
from pipeline.config.schema import Params
from pipeline.data.files import read_jsonl, replacing
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.judges.session import open_judge
from pipeline.evaluation.judging import judge_rows, scored_frame
from pipeline.evaluation.statistics import Bootstrap, prompt_means
from pipeline.evaluation.text_quality import quality_columns
from pipeline.generation.rows import generate_sweep
from pipeline.stages import prepare, train
from pipeline.stages.sweep import training_digest
from tests.bench.scratch import workspace_below
from tests.tiny import ROOT

OUT, SCRATCH = Path("results/trials"), Path("scratch/trials")
SHOWN = 5  # texts of each point
CONTROLS, EVEN_AND_ENDS = ("base", "sharpened"), ("p100_c000", "p050_c050", "p000_c100")  # points of the page
COLUMNS = ("positivity", "conciseness", "kl", "readable", "ended", "words", "perplexity", "distinct_2_within")


def composed(overrides: list[str]) -> tuple[Params, Path]:
    """The experiment, its held-out scorers left out, and the folder of its models."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=[*overrides, "tracking=disabled"])
    params = to_params(config)
    objectives = {name: replace(objective, held_out_scorer=None) for name, objective in params.objectives.items()}
    options = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    return replace(params, objectives=objectives), SCRATCH / training_digest(options)


def rows_of(params: Params, folder: Path) -> pd.DataFrame:
    """Sample and train what is not there yet; generate and score the validation prompts."""
    workspace = workspace_below(folder, params.base, params.arm.base, params.data.sampler)
    if not (workspace.results / "prepare" / "data_card.json").exists():
        prepare.run(params, workspace)
    for objective in params.objectives:
        if not workspace.arm(objective).exists():
            train.run(params, workspace, objective)
    prompts = [row["prompt"] for _, row in read_jsonl(Path(params.data.prompts)) if row["split"] == "validation"]
    rows = generate_sweep(params, workspace, params.base, prompts)
    resources = Resources(params.models, workspace, params.decoding.device)
    return scored_frame(judge_rows(rows, open_judge(params.judge, params.objectives, resources), {}), params.objectives)


def lines_of(name: str, overrides: list[str], params: Params, rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each point."""
    lines = []
    for point, own in rows.groupby("point", sort=False):
        line: dict[str, object] = {"trial": name, "overrides": " ".join(overrides), "point": point}
        line |= {objective: prompt_means(own, objective).mean() for objective in params.objectives}
        line |= {
            "kl": own.kl.mean(),
            **quality_columns(own, params.objectives, Bootstrap.of(params.judge, params.seed)),
        }
        lines.append(line)
    return pd.DataFrame(lines).round(3)


def keep(name: str, found: pd.DataFrame, file: Path, column: str = "trial") -> None:
    """Put the lines of a trial in the place of those of an earlier one."""
    before = pd.read_csv(file) if file.exists() else pd.DataFrame({column: []})
    with replacing(file) as stream:
        pd.concat([before[before[column] != name], found]).to_csv(stream, index=False)


def page(table: pd.DataFrame) -> str:
    """README.md: every trial at the ends and in the middle of the sweep."""
    columns = list(COLUMNS)
    lines = [
        "# Trials",
        "",
        "Written by `python -m tests.bench.trials`: what was tried before the default experiment was settled, measured "
        "on the 40 validation prompts, one response each (a standard error of a score is about 0.05). *Changes* are to "
        "the default; [table.csv](table.csv) has every point and measure, [texts.csv](texts.csv) the first texts.",
        "",
        "| trial | changes | point | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    controls = table[table.point.isin(CONTROLS)].drop_duplicates("point").assign(trial="–", overrides="")
    for line in pd.concat([controls, table[~table.point.isin(CONTROLS)]]).to_dict("records"):
        if line["point"] in (*CONTROLS, *EVEN_AND_ENDS):
            changes = f"`{line['overrides']}`" if isinstance(line["overrides"], str) and line["overrides"] else "–"
            values = " | ".join(f"{line[name]:.2f}" for name in columns)
            lines.append(f"| {line['trial']} | {changes} | {line['point']} | {values} |")
    return "\n".join(lines) + "\n"


def page_of_rivals(table: pd.DataFrame) -> str:
    """What follows in README.md: the trials of `tests.bench.rivals`, best first."""
    lines = [
        "",
        "## Rivals",
        "",
        "Written by `python -m tests.bench.rivals`: settings of DPO (`mod`: its policies mixed token by token), of "
        "ARMs for all mixes and of prefix scorers, on the same pairs and validation prompts, beside GenARM as it is. "
        "All settings and measures are in [rivals.csv](rivals.csv); the best of each are those of `tune=comparison`.",
        "",
        "| method | β | lr | scale | on | readable hypervolume | hypervolume | positivity end | conciseness end | "
        "readable there |",
        "|---" * 10 + "|",
    ]
    for row in table.itertuples():
        settings = " | ".join("–" if pd.isna(value) else f"{value:g}" for value in (row.beta, row.lr, row.scale))
        lines.append(
            f"| {row.method} | {settings} | {row.machine} | {row.readable_hypervolume:.3f} | {row.hypervolume:.3f} | "
            f"{row.reward_positivity_p100_c000:.2f} | {row.reward_conciseness_p000_c100:.2f} | "
            f"{row.readable_p100_c000:.2f}, {row.readable_p000_c100:.2f} |"
        )
    return "\n".join(lines) + "\n"


def write_page() -> None:
    """Write README.md from table.csv and rivals.csv."""
    with replacing(OUT / "README.md") as stream:
        stream.write(page(pd.read_csv(OUT / "table.csv")))
        if (OUT / "rivals.csv").exists():
            stream.write(page_of_rivals(pd.read_csv(OUT / "rivals.csv")))


def main() -> None:
    """Run a trial."""
    parser = ArgumentParser("python -m tests.bench.trials")
    parser.add_argument("name", nargs="?", help="of the trial; without it the page is written again")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--table", type=Path, help="the file of the lines, in the place of results/trials/")
    options = parser.parse_intermixed_args()
    if options.name is None:
        write_page()
        return
    started = time.monotonic()
    params, folder = composed(options.overrides)
    rows = rows_of(params, folder)
    table = lines_of(options.name, options.overrides, params, rows)
    texts = rows.groupby("point", sort=False).head(SHOWN)[["point", "prompt", "response"]]
    keep(options.name, table, options.table or OUT / "table.csv")
    if not options.table:
        keep(options.name, texts.assign(trial=options.name), OUT / "texts.csv")
        write_page()
    print(table.drop(columns=["trial", "overrides"]).to_string(index=False))
    for text in texts.itertuples():
        print(f"{text.point}: {' '.join(text.response.split())}")
    print(f"{folder}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
