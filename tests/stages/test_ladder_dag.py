"""The weak-to-strong experiment through DVC on a tiny random model and a model distilled from it."""

import json

import pandas as pd
import pytest

from tests.stages.repository import compose, run


@pytest.fixture(scope="module")
def ladder(repository):
    compose(repository, "experiment=smoke_weak_to_strong")
    run(repository, "dvc", "repro", "-q")
    return repository


def test_the_table_the_figure_and_the_page_cover_every_base(ladder):
    table = pd.read_csv(ladder / "results/weak_to_strong/table.csv")
    assert list(table.base.unique()) == ["tiny-1l", "tiny"]
    assert set(table.method) == {
        "control", "sharpened", "genarm", "genarm_log_ratio", "arm", "dpo", "best_of_2", "nudging", "byte_proxy_tuning"
    }  # fmt: skip
    assert (table[table.method == "control"].kl == 0).all()
    assert (ladder / "results/weak_to_strong/figure.png").read_bytes().startswith(b"\x89PNG")
    html = (ladder / "results/weak_to_strong/index.html").read_text()
    assert "http://" not in html and "https://" not in html and "tiny-1l" in html
    assert "../weak_to_strong/index.html" in (ladder / "results/report/index.html").read_text()
    facts = json.loads((ladder / "results/models/tiny-1l.json").read_text())
    assert facts["layers"] == 1 and {"perplexity", "parent_perplexity", "kl", "steps"} <= facts.keys()


def test_another_base_trains_no_arm_and_distils_nothing(ladder):
    assert "up to date" in run(ladder, "dvc", "repro")
    compose(ladder, "experiment=smoke_weak_to_strong", "base=tiny-1l")
    printed = run(ladder, "dvc", "repro")
    assert "Running stage 'generate'" in printed
    assert not any(f"Running stage '{name}" in printed for name in ("fetch", "distil", "prepare", "train", "tune"))
    assert "0 of" not in printed.split("rows are in the store")[0].splitlines()[-1], "the rows of the ladder are reused"


def test_multirun_runs_the_ladder(ladder):
    run(
        ladder, "python", "-m", "pipeline", "sweep", "--multirun", "experiment=smoke_weak_to_strong",
        "base=tiny-1l,tiny", "hydra.sweep.dir=scratch/sweep",
    )  # fmt: skip
    fronts = [pd.read_csv(path) for path in sorted((ladder / "scratch/sweep").glob("*/pareto/front.csv"))]
    assert sorted(front.base[0] for front in fronts) == ["tiny", "tiny-1l"]
    assert {"base", "genarm", "genarm_log_ratio", "arm", "dpo"} == set(fronts[0].method)


def test_a_queue_of_experiments_runs_the_ladder(ladder):
    compose(ladder, "experiment=smoke_weak_to_strong")
    run(ladder, "dvc", "repro", "-q")
    run(ladder, "git", "add", "-A")
    run(ladder, "git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", "commit", "-qm", "start")
    queued = ["-S", "experiment=smoke_weak_to_strong", "-S", "base=tiny-1l,tiny"]
    run(ladder, "dvc", "exp", "run", "--queue", *queued)
    assert run(ladder, "dvc", "queue", "status").count("Queued") == 2
