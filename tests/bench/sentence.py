"""Does the dial beat the sentence? What experiment=sentence finds, at the size that is asked for.

    python -m tests.bench.sentence                                                  # as published: hours on two cores
    python -m tests.bench.sentence --processes 6                                    # as many at once, on one GPU
    python -m tests.bench.sentence --prompts 24 --samples 1 --train 48 --methods log_ratio instruction

Writes results/sentence/: table.csv, texts.csv (five texts of each line, the first ones), cards.json, and README.md,
whose every figure is read from these. Models and stores are the project's own; ARMs lie below scratch/sentence/.
"""

import json
import time
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_dir

from pipeline.config.load import to_params
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl, replacing, write_json
from pipeline.evaluation.judging import judge_rows, scored_frame
from pipeline.evaluation.standings import UNGUIDED
from pipeline.evaluation.statistics import Bootstrap, bootstrap_mean, prompt_means
from pipeline.evaluation.text_quality import HIGHEST_PERPLEXITY, distinct_2, readable
from pipeline.generation import comparison
from pipeline.generation.rows import generate_sweep
from pipeline.stages import prepare, train, tune
from tests.bench.scratch import generate_by_method, machine, timed, trained, workspace_below
from tests.tiny import ROOT

OUT, SCRATCH = Path("results/sentence"), Path("scratch/sentence")
SHOWN = 5


def composed(prompts: int, samples: int, train_prompts: int | None, tokens: int, methods: list[str]) -> Params:
    """The experiment at a size; best-of-4 and DPO are trained only if they are asked for."""
    sizes = [f"decoding.samples_per_prompt={samples}", f"comparison.prompts={prompts}", "tracking=disabled"]
    sizes += [f"decoding.max_new_tokens={tokens}", f"data.sampling.max_new_tokens={tokens}"]
    if train_prompts is not None:
        sizes.append(
            f"data.limits={{train: {train_prompts}, validation: {train_prompts // 12}, test: {train_prompts // 3}}}"
        )
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        params = to_params(compose("config", overrides=["experiment=sentence", *sizes]))
    params = replace(
        params, data=replace(params.data, prompts=str(ROOT / params.data.prompts), path=str(ROOT / params.data.path))
    )
    chosen = {name: method for name, method in params.comparison.methods.items() if not methods or name in methods}
    needed = {"best_of_n": "reward_model", "mod": "dpo"}
    kinds = {kind for name, kind in needed.items() if name in chosen}
    rivals = {name: rival for name, rival in params.tune.rivals.items() if rival.kind in kinds}
    return replace(
        params,
        comparison=replace(params.comparison, methods=chosen),
        tune=replace(params.tune, rivals=rivals),
    )


def prepared(params: Params, workspace: Workspace, processes: int) -> dict[str, float]:
    """Prepare, and train what is not there yet; seconds by step, of the run that did it."""
    file = SCRATCH / "seconds.json"
    seconds: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    seconds.setdefault("sampling and cards", timed(prepare.run, params, workspace))
    arms = {
        f"training {name}": (train.run, (params, workspace, name))
        for name in params.objectives
        if not workspace.arm(name).exists()
    }
    rivals = {
        f"training {name} for comparison": (tune.run, (params, workspace, params.base, name))
        for name in params.tune.rivals
        if not workspace.rival(params.base, name).exists()
    }
    seconds |= trained(arms | rivals, processes)
    write_json(file, seconds)
    return seconds


def rows_of(params: Params, workspace: Workspace, processes: int) -> pd.DataFrame:
    """The lines of the comparison and the points below zero, scored by every objective's scorer."""
    # Of the file itself, which prepare has compared with the training prompts: a limit of test pairs is not one of it.
    prompts = [row["prompt"] for _, row in read_jsonl(Path(params.data.prompts))]
    prompts = prompts[: params.comparison.prompts]
    judge = comparison.open_comparing_judge(params, workspace)
    if processes > 1:
        generate_by_method(params, workspace, prompts, processes)
    rows = comparison.generate(params, workspace, prompts, judge)
    below = {
        name: point for name, point in params.sweep.points.items() if any(alpha < 0 for alpha in point.weights.values())
    }
    away = generate_sweep(replace(params, sweep=replace(params.sweep, points=below)), workspace, params.base, prompts)
    extra = [replace(row, method="log_ratio", line=f"log_ratio/{row.point}", forwards=2 * row.n_tokens) for row in away]
    return scored_frame([*rows, *judge_rows(extra, judge, {})], params.objectives)


def strength_of(line: str, params: Params) -> tuple[str, float]:
    """The objective that a line is of, and its α."""
    point, _, times = line.partition("/")[2].partition(" x")
    [(objective, alpha)] = params.sweep.points[point].weights.items()
    return objective, alpha * float(times or 1)


def table_of(params: Params, rows: pd.DataFrame) -> pd.DataFrame:
    """One line per objective, method and α; the base stands once for each objective."""
    base = rows[rows.method == UNGUIDED]
    lines = []
    for objective in params.objectives:
        lines.append(line_of(params, base, objective, "base", 0.0))
        for line, own in rows[rows.method != UNGUIDED].groupby("line", sort=False):
            name, alpha = strength_of(str(line), params)
            if name == objective:
                lines.append(line_of(params, own, objective, str(own.method.iloc[0]), alpha))
    table = pd.DataFrame(lines)
    order = {name: place for place, name in enumerate(["base", *params.comparison.methods])}
    table["order"] = table.method.map(order)
    keys = {name: place for place, name in enumerate(params.objectives)}
    table["group"] = table.objective.map(keys)
    return table.sort_values(["group", "order", "alpha"]).drop(columns=["order", "group"]).round(3)


def perplexity(rows: pd.DataFrame) -> float:
    """Of the texts under the base."""
    return float(2.718281828459045 ** (-rows.logp_base.sum() / rows.n_tokens.sum()))


def line_of(params: Params, rows: pd.DataFrame, objective: str, method: str, alpha: float) -> dict:
    """The measures of a method at a strength."""
    judge = params.judge
    values = prompt_means(rows, objective)
    mean, low, high = bootstrap_mean(values, Bootstrap.of(judge, params.seed))
    return {
        "objective": objective, "method": method, "alpha": alpha, "score": mean, "ci_low": low, "ci_high": high,
        "readable": readable(rows).mean(), "words": rows.response.str.split().str.len().mean(),
        "ended": (rows.finish == "eos").mean(), "perplexity": perplexity(rows),
        "distinct_2": distinct_2(list(rows.response)), "kl": rows.kl.mean(),
        "forwards_per_token": rows.forwards.sum() / rows.n_tokens.sum(), "texts": len(rows),
    }  # fmt: skip


def readme(params: Params, table: pd.DataFrame, cards: dict, seconds: dict[str, float], texts: pd.DataFrame) -> str:
    """The page of the folder."""
    samples = params.decoding.samples_per_prompt
    prompts = int(table.texts.max()) // samples
    limits = params.data.limits
    trained = limits.get("train", "all")
    lines = [
        "# Does the dial beat the sentence?", "",
        f"Written by `python -m tests.bench.sentence`. {params.base}; each dial from {trained} training prompts with "
        f"{params.data.sampling.responses_per_prompt} responses under each of its two sentences; measured on {prompts} "
        f"prompts that nothing was trained or chosen on, {samples} sample(s) each of {params.decoding.max_new_tokens} "
        "tokens. The scorers took no part in training. Intervals resample prompts. *Readable* is the share of "
        "responses with words enough, none drawn out, that do not repeat themselves and whose perplexity under the "
        f"base is at most {HIGHEST_PERPLEXITY:g}; KL is to the base at the bare prompt, in nats per response; "
        "*forwards* are per token, prompts not counted. A short text has a high perplexity, since its end is one of "
        "few tokens.", "",
    ]  # fmt: skip
    for objective, spec in params.objectives.items():
        card = cards[objective]
        accuracy = card["trained"]
        lines += [
            f"## {objective}", "", f"“{spec.wanted}” against “{spec.unwanted}”, scored by `{spec.scorer}`.", "",
            f"- card: {card['verdict']}",
            f"- pairs: {card['sampled']} sampled, left out: "
            + (", ".join(f"{count} ({reason})" for reason, count in card["left out"].items()) or "none"),
            f"- words: {card['words']['wanted']} wanted, {card['words']['unwanted']} unwanted; ended by itself: "
            f"{card['ended']['wanted']:.2f} and {card['ended']['unwanted']:.2f}",
            f"- held-out accuracy of the ARM: {accuracy['accuracy']:.2f} [{accuracy['ci_low']:.2f}, "
            f"{accuracy['ci_high']:.2f}] on {accuracy['pairs']} pairs", "",
            "| method | α | score | readable | words | ended | perplexity | distinct-2 | KL | forwards |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for line in table[table.objective == objective].to_dict("records"):
            lines.append(
                f"| {line['method']} | {line['alpha']:g} | {line['score']:.2f} [{line['ci_low']:.2f}, "
                f"{line['ci_high']:.2f}] | {line['readable']:.2f} | {line['words']:.1f} | {line['ended']:.2f} | "
                f"{line['perplexity']:.1f} | {line['distinct_2']:.2f} | {line['kl']:.1f} | "
                f"{line['forwards_per_token']:.0f} |"
            )
        lines += ["", "The first texts at α = 1 and at α = −1, unselected:", ""]
        for line in (f"log_ratio/{objective}", f"log_ratio/not_{objective}"):
            shown = texts[texts.line == line].response
            lines += [f"- {line.partition('/')[2]}: " + " ".join(str(text).split()) for text in shown]
        lines.append("")
    lines += ["## Time", ""]
    lines += [f"- {step}: {spent:.0f} s" for step, spent in seconds.items()]
    lines.append(
        f"\nOn {machine()}, which other work may have used at the same time; responses that the row store had already "
        "took no time."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run it."""
    parser = ArgumentParser("python -m tests.bench.sentence")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--train", type=int, help="training prompts; all of them without it")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--methods", nargs="*", default=[], help="of the comparison; all of them without it")
    parser.add_argument("--processes", type=int, default=1, help="at once: of trainings, and of methods")
    given = parser.parse_args()
    params = composed(given.prompts, given.samples, given.train, given.tokens, given.methods)
    workspace = workspace_below(SCRATCH, params.base)
    seconds = prepared(params, workspace, given.processes)
    started = time.monotonic()
    rows = rows_of(params, workspace, given.processes)
    seconds["generating and scoring"] = time.monotonic() - started
    card = json.loads((workspace.results / "prepare" / "data_card.json").read_text())["objectives"]
    for name in params.objectives:
        card[name]["trained"] = json.loads((workspace.results / "train" / name / "metrics.json").read_text())
    table = table_of(params, rows)
    texts = rows.groupby("line", sort=False).head(SHOWN)[["line", "prompt", "response"]]
    for name, found in (("table", table), ("texts", texts)):
        with replacing(OUT / f"{name}.csv") as stream:
            found.to_csv(stream, index=False)
    write_json(OUT / "cards.json", card)
    with replacing(OUT / "README.md") as stream:
        stream.write(readme(params, table, card, seconds, texts))
    print((OUT / "README.md").read_text())


if __name__ == "__main__":
    main()
