"""What guidance costs elsewhere: tasks of BIG-bench, by lm-evaluation-harness, under the guided law.

    pip download --no-deps --no-binary :all: bigbench==1.0.0            # 360 MB, on PyPI: the tasks' own JSON files
    python -m tests.bench.alignment_tax bigbench-1.0.0.tar.gz [--items 100]

After `make repro`, with the extra `lm-eval`. Writes results/alignment_tax/table.csv and README.md there.
"""

import json
import tarfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace
from pipeline.data.files import replacing
from pipeline.evaluation.statistics import Bootstrap, bootstrap_mean, share
from pipeline.generation.harness import GuidedLM

OUT = Path("results/alignment_tax")
# Chosen by their names, before any was scored: short English questions that such a small model may get right.
TASKS = {
    "phrase_relatedness": ["phrase_relatedness"],
    "similarities_abstraction": ["similarities_abstraction"],
    "intent_recognition": ["intent_recognition"],
    "social_iqa": ["social_iqa"],
    "entailed_polarity": ["entailed_polarity"],
    "hhh_alignment": [f"hhh_alignment/{part}" for part in ("helpful", "honest", "harmless", "other")],
}
POINTS: list[dict[str, Any]] = [
    {},
    {"positivity": 1.0},
    {"conciseness": 1.0},
    {"positivity": 0.5, "conciseness": 0.5},
    {"positivity": 0.5, "conciseness": 0.5, "form": "log_ratio"},
]


def questions(task: dict[str, Any]) -> list[dict[str, Any]]:
    """The multiple-choice questions of a BIG-bench task file, asked as BIG-bench asks them without examples."""
    before, after = task.get("example_input_prefix", "\nQ: "), task.get("example_output_prefix", "\nA: ")
    rows = []
    for example in task["examples"]:
        choices = list(example["target_scores"])
        text = before + example["input"]
        if task.get("append_choices_to_input", True):
            text += "".join(f"\n  choice: {choice}" for choice in choices)
        best = max(choices, key=example["target_scores"].__getitem__)
        rows.append({"question": (text + after).strip(), "choices": choices, "gold": choices.index(best)})
    return rows


def write_tasks(archive: Path, folder: Path, items: int) -> None:
    """Each task as a file of questions and the harness's YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {f"/benchmark_tasks/{part}/task.json": name for name, parts in TASKS.items() for part in parts}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    with tarfile.open(archive) as opened:
        for member in opened:
            for end, name in wanted.items():
                if member.isfile() and member.name.endswith(end):
                    part = questions(json.loads(opened.extractfile(member).read()))
                    rows[name] += part[: items if len(TASKS[name]) == 1 else None]
    for name, asked in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
        config = {
            "task": f"bigbench_{name}", "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file.resolve())}}, "test_split": "test",
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
            "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")


def scored(point: dict[str, Any], folder: Path) -> dict[str, pd.DataFrame]:
    """Whether each question was answered rightly at a point, per task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        GuidedLM(batch_size=8, **point), tasks=[f"bigbench_{name}" for name in TASKS], apply_chat_template=True,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False), log_samples=True,
        bootstrap_iters=0,
    )  # fmt: skip
    return {
        name: pd.DataFrame(
            [
                {"question": row["doc"]["question"], "choices": len(row["doc"]["choices"]), "acc": row["acc"],
                 "acc_norm": row["acc_norm"]}
                for row in sorted(found["samples"][f"bigbench_{name}"], key=lambda row: row["doc_id"])
            ]
        )
        for name in TASKS
    }  # fmt: skip


def lines_of(point: dict[str, Any], here: dict[str, pd.DataFrame], base: dict[str, pd.DataFrame], bootstrap: Bootstrap):
    """The point's rows of the table, with the paired difference to the base over questions."""
    alphas = {name: alpha for name, alpha in point.items() if name != "form"}
    for name, frame in here.items():
        line = {"task": name, "form": point.get("form", "plain") if alphas else "base"}
        line |= {f"alpha_{objective}": alphas.get(objective, 0.0) for objective in ("positivity", "conciseness")}
        line |= {"questions": len(frame), "chance": float((1 / frame["choices"]).mean())}
        for metric in ("acc", "acc_norm"):
            right = share(frame[metric].tolist(), frame["question"].tolist(), bootstrap)
            line |= {metric: right.value, f"{metric}_ci_low": right.ci_low, f"{metric}_ci_high": right.ci_high}
            change = (frame[metric] - base[name][metric]).groupby(frame["question"]).mean().to_numpy()
            mean, low, high = bootstrap_mean(change, bootstrap)
            line |= {f"{metric}_change": mean, f"{metric}_change_low": low, f"{metric}_change_high": high}
        yield line


def page(table: pd.DataFrame) -> str:
    """README.md: accuracy per task at every point, and its change."""
    run = table.iloc[0]
    lines = [
        "# Alignment tax",
        "",
        "Written by `python -m tests.bench.alignment_tax` from [table.csv](table.csv): tasks of BIG-bench, scored by "
        "lm-evaluation-harness under the guided law, questions in the chat template, no examples. "
        f"Base {run['base']}, the ARMs of `make repro`, α for positivity and conciseness. Accuracy is the harness's "
        "`acc_norm` (log-likelihood per byte of an answer), with `acc` (its sum) in the table file; in brackets the "
        "95 % interval of the paired change against the base, by bootstrap over distinct questions. ▼ and ▲ mark "
        "intervals that leave out 0.",
        "",
    ]
    points = table.drop_duplicates(["form", "alpha_positivity", "alpha_conciseness"])
    titles = [
        "base" if point.form == "base" else f"{point.alpha_positivity:g}, {point.alpha_conciseness:g}"
        + (" (log-ratio)" if point.form == "log_ratio" else "")
        for point in points.itertuples()
    ]  # fmt: skip
    lines += ["| task (questions, chance) | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for task, rows in table.groupby("task", sort=False):
        cells = []
        for row in rows.itertuples():
            change = f" [{row.acc_norm_change_low:+.2f}, {row.acc_norm_change_high:+.2f}]"
            mark = " ▼" if row.acc_norm_change_high < 0 else " ▲" if row.acc_norm_change_low > 0 else ""
            cells.append(f"{row.acc_norm:.2f}" + ("" if row.form == "base" else change + mark))
        first = rows.iloc[0]
        lines.append(f"| {task} ({first.questions}, {first.chance:.2f}) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Score every point."""
    parser = ArgumentParser("python -m tests.bench.alignment_tax")
    parser.add_argument("archive", type=Path)
    parser.add_argument("--items", type=int, default=100, help="questions of a task at most")
    options = parser.parse_args()
    params = load_params()
    folder, bootstrap = Workspace().scratch / "alignment_tax", Bootstrap.of(params.judge, params.seed)
    write_tasks(options.archive, folder, options.items)
    frames = [scored(point, folder) for point in POINTS]
    lines = [
        line for point, here in zip(POINTS, frames, strict=True) for line in lines_of(point, here, frames[0], bootstrap)
    ]
    table = pd.DataFrame(lines).assign(base=params.base).round(4)
    with replacing(OUT / "table.csv") as stream:
        table.to_csv(stream, index=False)
    with replacing(OUT / "README.md") as stream:
        stream.write(page(table))


if __name__ == "__main__":
    main()
