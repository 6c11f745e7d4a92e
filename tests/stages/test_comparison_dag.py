"""The comparison of methods through DVC on a tiny random model."""

import json

import pandas as pd
import pytest

from tests.stages.repository import compose, run

METHODS = [
    "base", "genarm", "log_ratio", "genarm_dpo", "parm", "uniarm", "mod", "morl", "soup", "soup_factors",
    "best_of_n", "args", "transfer_q", "cards", "fudge", "controlled_decoding",
]  # fmt: skip
FEWER = [f"~{section}.p{mix}" for section in ("tune.rivals", "sweep.points") for mix in ("075_c025", "025_c075")]


@pytest.fixture(scope="module")
def compared(repository):
    compose(repository, "experiment=smoke_comparison", *FEWER)
    run(repository, "dvc", "repro", "-q")
    return repository


def table(copy, name):
    return pd.read_csv(copy / "results/comparison" / f"{name}.csv")


def test_every_method_has_its_lines_and_its_cost(compared):
    found = table(compared, "table")
    assert list(found.method.unique()) == METHODS
    fronts = found.drop_duplicates(["method", "point"])
    assert (fronts[fronts.method != "base"].groupby("method").size() == 3).all()
    cost = found.groupby("method").forwards_per_token.mean()
    assert (
        cost["base"] == 1
        and cost["parm"] == cost["uniarm"] == 2
        and cost["fudge"] == 1
        and cost["morl"] >= 1
        and cost["args"] > 4
    )
    mixed = found[(found.point == "p050_c050")].set_index("method").forwards_per_token
    assert mixed["genarm"] == mixed["mod"] == mixed["log_ratio"] == 3 and mixed["soup"] == 2, "the base computes all"
    trained = found.groupby("method").train_tokens.first()
    assert trained["base"] == 0 and trained["morl"] > trained["mod"] > 0 and trained["mod"] == trained["soup"]
    assert found[found.method == "cards"].kl.isna().all() and found[found.method != "cards"].kl.notna().all()
    assert set(found.prompts) == {2, 3, found.prompts.max()}


def test_a_method_is_no_better_than_itself(compared):
    fronts = table(compared, "fronts").set_index("method")
    assert list(fronts.index) == METHODS
    assert tuple(fronts.loc["genarm", ["delta_hv", "delta_ci_low", "delta_ci_high"]]) == (0, 0, 0)
    held = (fronts.delta_ci_low <= fronts.delta_hv + 1e-4) & (fronts.delta_hv <= fronts.delta_ci_high + 1e-4)
    assert held.all()
    matched = table(compared, "matched")
    assert {"positivity", "conciseness"} == set(matched.objective) and "cards" not in set(matched.method)


def test_wins_and_losses_are_one(compared):
    wins = table(compared, "wins").set_index(["method", "other"]).win_rate
    for one, other in wins.index:
        assert wins[one, other] + wins[other, one] == pytest.approx(1, abs=1e-3)


def test_the_page_and_the_responses_are_there(compared):
    out = compared / "results/comparison"
    html = (out / "index.html").read_text()
    assert "http://" not in html and "https://" not in html and all(method in html for method in METHODS)
    assert (out / "fronts.png").read_bytes().startswith(b"\x89PNG")
    answers = json.loads((out / "alpaca_eval/genarm-p050_c050.json").read_text())
    assert answers and set(answers[0]) == {"instruction", "output", "generator", "dataset"}


def test_it_is_up_to_date_and_a_method_more_costs_only_itself(compared):
    assert "up to date" in run(compared, "dvc", "repro")
    compose(compared, "experiment=smoke_comparison", *FEWER, "comparison.methods.best_of_n.n=3")
    printed = run(compared, "dvc", "repro")
    assert "Running stage 'comparison" in printed and "Running stage 'tune" not in printed
    told = [line for line in printed.splitlines() if "rows are in the store already" in line]
    fresh = [line for line in told if len(set(line.split(": ")[1].split(" rows")[0].split(" of "))) > 1]
    assert len(fresh) == 1, told
