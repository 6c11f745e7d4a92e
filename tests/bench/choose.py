"""What `python -m pipeline choose` promises on validation prompts, against what the test prompts then give.

    python -m tests.bench.choose [--samples 2] [--points 6]

After `make repro`. For each target weights are chosen on the validation prompts; then the test prompts are generated
and judged at them, once. Writes results/choose/table.csv and README.md there.
"""

from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pandas as pd

from pipeline.config.load import load_params
from pipeline.config.schema import Params, Point, Sweep
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl, replacing
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.judges.session import JudgeSession, open_judge
from pipeline.evaluation.judging import judge_rows, scored_frame
from pipeline.evaluation.statistics import Bootstrap, bootstrap_mean, prompt_means
from pipeline.evaluation.targets import WORST, Target
from pipeline.generation.rows import generate_sweep
from pipeline.generation.targets import Choice, TargetSearch
from pipeline.models.loading import resolve_device, resolve_dtype

OUT = Path("results/choose")
TARGETS = {
    "positivity ≥ 0.6, least KL": Target({"positivity": 0.6}),
    "positivity ≥ 0.8, least KL": Target({"positivity": 0.8}),
    "conciseness ≥ 0.3, least KL": Target({"conciseness": 0.3}),
    "conciseness ≥ 0.5, least KL": Target({"conciseness": 0.5}),
    "positivity ≥ 0.7, most conciseness": Target({"positivity": 0.7}, "conciseness"),
    "conciseness ≥ 0.4, most positivity": Target({"conciseness": 0.4}, "positivity"),
    "the best worst objective": Target(maximise=WORST),
    "the best worst objective, KL ≤ 8": Target(maximise=WORST, kl=8.0),
    "most positivity, KL ≤ 8": Target(maximise="positivity", kl=8.0),
    "positivity ≥ 0.9 and conciseness ≥ 0.8": Target({"positivity": 0.9, "conciseness": 0.8}),
}


def measured(params: Params, workspace: Workspace, judge: JudgeSession, choice: Choice) -> dict[str, float]:
    """What the test prompts give at the chosen weights: means and intervals of the rewards, and the mean KL."""
    prompts = [row["prompt"] for _, row in read_jsonl(workspace.results / "prepare" / "prompts.jsonl")]
    weights = {name: weight for name, weight in choice.weights.items() if weight}
    params = replace(params, sweep=Sweep("chosen", {"chosen": Point(weights)}))
    rows = judge_rows(generate_sweep(params, workspace, params.base, prompts), judge, {})
    frame = scored_frame(rows, params.objectives)
    bootstrap, line = Bootstrap.of(params.judge, params.seed), {}
    for name in (*params.objectives, "kl"):
        mean, low, high = bootstrap_mean(prompt_means(frame, name), bootstrap)
        line |= {f"measured_{name}": mean, f"measured_{name}_ci_low": low, f"measured_{name}_ci_high": high}
    return line


def promised(choice: Choice) -> dict[str, float]:
    """What was promised, likewise."""
    line = {}
    for name, (mean, low, high) in {**choice.rewards, "kl": choice.kl}.items():
        line |= {f"promised_{name}": mean, f"promised_{name}_ci_low": low, f"promised_{name}_ci_high": high}
    return line


def page(table: pd.DataFrame, objectives: list[str]) -> str:
    """README.md: every target, what was chosen, promised and measured."""
    names, run = [*objectives, "kl"], table.iloc[0]
    inside = [
        int(((table[f"measured_{name}"] - table[f"promised_{name}"]).abs() <= _margin(table, name)).sum())
        for name in names
    ]
    lines = [
        "# Promised and measured",
        "",
        "Written by `python -m tests.bench.choose` from [table.csv](table.csv): weights chosen by "
        f"`python -m pipeline choose` on {run.validation_prompts} validation prompts, and what "
        f"{run.test_prompts} test prompts then gave at them. Models in {run['dtype']}; another dtype samples and "
        "trains other models, so these are not the figures of [pareto](../pareto/README.md).",
        "",
        "| target | weights | " + " | ".join(f"{title}, promised | measured" for title in (*objectives, "KL")) + " |",
        "|---" * (2 + 2 * len(names)) + "|",
    ]
    for line in table.to_dict("records"):
        weights = ", ".join(f"{line[f'alpha_{name}']:.2f}" for name in objectives)
        cells = [
            f"{line[f'{kind}_{name}']:.{digits}f} [{line[f'{kind}_{name}_ci_low']:.{digits}f}, "
            f"{line[f'{kind}_{name}_ci_high']:.{digits}f}]"
            for name, digits in ((name, 1 if name == "kl" else 2) for name in names)
            for kind in ("promised", "measured")
        ]
        reach = " (out of reach: the nearest)" if line["shortfall"] > 0 else ""
        lines.append(f"| {line['target']}{reach} | {weights} | " + " | ".join(cells) + " |")
    said = ", ".join(
        f"{count} of {len(table)} on {name}" for name, count in zip((*objectives, "KL"), inside, strict=True)
    )
    lines += [
        "",
        "Intervals are 95 % bootstraps over the prompts of each side. Both agree within the interval "
        f"of their difference: {said}.",
    ]
    return "\n".join(lines) + "\n"


def _margin(table: pd.DataFrame, name: str) -> pd.Series:
    """Half the interval of measured minus promised, the two being of different prompts."""
    halves = [
        (table[f"{kind}_{name}_ci_high"] - table[f"{kind}_{name}_ci_low"]) / 2 for kind in ("promised", "measured")
    ]
    return (halves[0] ** 2 + halves[1] ** 2) ** 0.5


def main() -> None:
    """Choose for every target, and measure."""
    parser = ArgumentParser("python -m tests.bench.choose")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--points", type=int, default=6)
    options = parser.parse_args()
    params, workspace = load_params(), Workspace()
    judge = open_judge(params.judge, params.objectives, Resources(params.models, workspace, params.decoding.device))
    search, lines = TargetSearch(params, workspace, judge, options.samples), []
    choices = {name: search.choose(target, options.points) for name, target in TARGETS.items()}
    for name, choice in choices.items():
        line = {"target": name, **{f"alpha_{objective}": weight for objective, weight in choice.weights.items()}}
        line |= {"shortfall": choice.shortfall, "points": choice.measured, **promised(choice)}
        lines.append(line | measured(params, workspace, judge, choice))
        print(lines[-1])
    dtype = str(resolve_dtype(params.models[params.base].dtype, resolve_device(params.decoding.device)))
    tested = sum(1 for _ in read_jsonl(workspace.results / "prepare" / "prompts.jsonl"))
    counts = {"validation_prompts": len(search.prompts), "test_prompts": tested, "samples": options.samples}
    table = pd.DataFrame(lines).round(4).assign(dtype=dtype.removeprefix("torch."), **counts)
    with replacing(OUT / "table.csv") as stream:
        table.to_csv(stream, index=False)
    with replacing(OUT / "README.md") as stream:
        stream.write(page(table, list(params.objectives)))


if __name__ == "__main__":
    main()
