"""The whole DAG through DVC on a tiny random model, in a throw-away copy of the repository."""

import json
import shutil
import sys

import nbformat
import pandas as pd
import pytest
import yaml
from nbclient import NotebookClient

from pipeline.training.checkpoints import newest_checkpoint
from tests.browser import opened
from tests.stages.repository import commit, compose, killed, run
from tests.tiny import ROOT


def test_every_stage_wrote_what_it_promises(copy):
    front = pd.read_csv(copy / "results/pareto/front.csv")
    assert list(front.point) == list(yaml.safe_load((copy / "params.yaml").read_text())["sweep"]["points"])
    wanted = [
        f"{part}_{name}"
        for name in ("positivity", "conciseness")
        for part in ("alpha", "score", "ci_low", "ci_high", "win_rate")
    ]
    assert {"method", "base", "point", "kl", "on_front", *wanted} <= set(front.columns)
    assert front.set_index("point").loc["sharpened", "win_rate_positivity"] == 0.5
    metrics = json.loads((copy / "results/pareto/metrics.json").read_text())
    assert {"hypervolume", "reference", "mip", "n_front", "spearman", "arms"} <= set(metrics)
    rows = [json.loads(line) for line in (copy / "results/generate/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 7 * 6 and len({(row["prompt"], row["point"]) for row in rows}) == len(rows)
    for name in ("positivity", "conciseness"):
        assert (copy / "models/arms" / name / "adapter_model.safetensors").is_file()
    html = (copy / "results/report/index.html").read_text()
    assert rows[0]["prompt"] in html and "tokens-lines" in html
    traces = json.loads((copy / "results/explain/tokens.json").read_text())
    assert {trace["point"] for trace in traces} == set(front.point) and len({trace["prompt"] for trace in traces}) == 3
    with opened((copy / "results/report/index.html").as_uri()) as browser:
        assert browser.locator("#samples-count").inner_text() == "6 of 6 prompts"
        assert browser.locator(".figure .mark").count() > len(front)
    assert (copy / "results/pareto/front.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_has_nothing_to_do(copy):
    assert "up to date" in run(copy, "dvc", "repro")


def test_dvc_shows_params_metrics_and_plots(copy):
    assert "hypervolume" in run(copy, "dvc", "metrics", "show")
    assert "train@positivity" in run(copy, "dvc", "dag")
    run(copy, "dvc", "plots", "show", "--out", "plots")
    assert "of the objective" in (copy / "plots/index.html").read_text()


def test_generate_killed_and_run_again_equals_an_uninterrupted_run(copy):
    store, output = copy / "scratch/store/generate.jsonl", copy / "results/generate/rows.jsonl"
    before = output.read_bytes()
    store.unlink()
    command = [sys.executable, "-m", "pipeline", "generate"]
    killed(copy, command, lambda: store.exists() and store.read_bytes().count(b"\n") >= 3)
    left = store.read_bytes().count(b"\n")
    assert 3 <= left < 42
    assert f"{left} of 42 rows are in the store already" in run(copy, *command)
    assert output.read_bytes() == before
    assert len(store.read_text().splitlines()) == 42


def test_train_killed_and_run_again_equals_an_uninterrupted_run(copy):
    files = [
        copy / name
        for name in ("models/arms/positivity/adapter_model.safetensors", "results/train/positivity/curve.csv")
    ]
    before = [file.read_bytes() for file in files]
    command = [sys.executable, "-m", "pipeline", "train", "--objective", "positivity"]
    killed(copy, command, lambda: any(map(newest_checkpoint, copy.glob("scratch/train/positivity-*"))))
    assert "going on from" in run(copy, *command)
    assert [file.read_bytes() for file in files] == before


def test_a_new_point_and_a_third_objective_retrain_nothing(copy):
    compose(copy, "experiment=smoke", "+sweep.points.p090={weights: {positivity: 0.9}}")
    printed = run(copy, "dvc", "repro")
    assert "Running stage 'train@" not in printed and "42 of 48 rows" in printed
    third = "{label: preferred_simplicity, scorer: simplicity, beta: 0.05, pretrained: null}"
    compose(copy, "experiment=smoke", f"+objectives.simplicity={third}")
    printed = run(copy, "dvc", "repro")
    assert not any(f"Running stage 'train@{name}'" in printed for name in ("positivity", "conciseness"))
    assert "Running stage 'train@simplicity'" in printed and "42 of 42 rows" in printed


def test_a_remote_brings_back_what_a_lost_cache_held(copy, tmp_path):
    run(copy, "dvc", "remote", "add", "-d", "store", str(tmp_path / "remote"))
    compose(copy, "experiment=smoke")
    for left in ("models/arms", "results/train"):  # of no stage any more, but inside folders that stages depend on
        shutil.rmtree(copy / left / "simplicity", ignore_errors=True)
    run(copy, "dvc", "repro", "-q")
    assert "Running stage" not in (settled := run(copy, "dvc", "repro")), settled[-3000:]
    run(copy, "dvc", "push", "-q")
    for lost in (".dvc/cache", "models", "results/prepare", "results/train", "results/generate", "results/judge"):
        shutil.rmtree(copy / lost)
    run(copy, "dvc", "pull", "-q")
    printed = run(copy, "dvc", "repro")
    assert "Running stage" not in printed and "up to date" in printed, printed[-3000:]
    run(copy, "dvc", "remote", "remove", "store")


def test_own_jsonl_goes_from_rows_to_front(copy):
    rows = [
        {
            "prompt": f"Question {n}?",
            "response_0": "good great " * (n % 5 + 1),
            "response_1": "bad",
            "short": 1,
            "warm": 0,
        }
        for n in range(60)
    ]
    (copy / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    labels = ["objectives.positivity.label=warm", "objectives.conciseness.label=short"]
    compose(copy, "experiment=smoke", "data=own", "data.path=mine.jsonl", *labels)
    run(copy, "dvc", "repro", "-q")
    assert len(pd.read_csv(copy / "results/pareto/front.csv")) == 7


@pytest.mark.parametrize("name", ["guided_decoding", "pareto_front"])
def test_notebooks_run_on_the_results(copy, name, monkeypatch):
    """The runs that pareto_front compares are the one above, of other data, and the one that was committed."""
    monkeypatch.setenv("OTHER_RUN", "HEAD")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), f"{name} is committed with outputs"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(copy / "notebooks")}}).execute()
    shown = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert {"guided_decoding": "rgba(", "pareto_front": " against "}[name] in shown
    assert len(list((ROOT / "notebooks").glob("*.ipynb"))) == 2


def test_a_broken_params_file_is_one_sentence(copy):
    text = (copy / "params.yaml").read_text()
    (copy / "params.yaml").write_text(text.replace("max_new_tokens", "max_new_token", 1))
    printed = run(copy, "python", "-m", "pipeline", "judge", check=False)
    (copy / "params.yaml").write_text(text)
    assert "error: params.yaml: unknown key" in printed and "Traceback" not in printed


def test_an_experiment_composes_runs_and_shows(copy):
    commit(copy, "start")
    run(copy, "dvc", "exp", "run", "-S", "experiment=smoke", "-S", "decoding.temperature=0.9")
    assert yaml.safe_load((copy / "params.yaml").read_text())["decoding"]["temperature"] == 0.9
    shown = run(copy, "dvc", "exp", "show", "--csv", "--only-changed")
    assert "hypervolume" in shown and "decoding.temperature" in shown
    assert "decoding.temperature" in run(copy, "dvc", "params", "diff")


def test_one_arm_for_all_mixes_is_one_training_and_separate_ones_come_back_from_the_cache(copy):
    compose(copy, "experiment=smoke")
    run(copy, "dvc", "repro", "-q", "generate")
    separate = (copy / "models/arms/positivity/adapter_model.safetensors").read_bytes()
    compose(copy, "experiment=smoke", "arm=parm")
    assert "Running stage 'train@all'" in run(copy, "dvc", "repro", "generate")
    assert (copy / "models/arms/positivity/adapter_model.safetensors").read_bytes() != separate
    compose(copy, "experiment=smoke")
    printed = run(copy, "dvc", "repro", "generate")
    assert "Running stage 'train@" not in printed, "both are in the cache"
    assert (copy / "models/arms/positivity/adapter_model.safetensors").read_bytes() == separate
