"""The comparison and the ladder, each to its page, by judges that are no oracles."""

import dataclasses

import pandas as pd
import pytest

from pipeline.config.errors import UserError
from pipeline.config.judges import LlmJudge, OracleJudge, RewardJudge, Scoring
from pipeline.config.methods import Comparison, GenArm, Policies
from pipeline.config.schema import Objective, Point, Rival, Sweep, Tune
from pipeline.data.files import write_json, write_jsonl
from pipeline.stages import comparison, weak_to_strong
from tests.endpoint import KEY, Server, longer

POINTS = {"base": Point(), "sharpened": Point(sharpen=1.0), "a100": Point({"human_preference": 1.0})}


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def asking(endpoint, **settings):
    rubrics = {"human_preference": "overall"}
    common = {"api_key_env": "JUDGE_KEY", "rubrics": rubrics, "orders": "seeded", "resamples": 50, **settings}
    return LlmJudge(kind="llm", base_url=endpoint.url, model="m", **common)


@pytest.fixture
def human(smoke_params, workspace, tiny, arms):
    """Human preference, as in the published experiments: no scorer, a trained ARM and a trained policy."""
    workspace.models.mkdir()
    workspace.model("tiny").symlink_to(tiny)
    trained = {workspace.arm("human_preference"): "one", workspace.rival("tiny", "human_preference"): "two"}
    for folder, name in trained.items():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(arms[name])
    for where in ("train/human_preference", "tune/tiny/human_preference"):
        write_json(workspace.results / where / "metrics.json", {"tokens": 10})
    facts = dict.fromkeys(("layers", "parameters", "perplexity", "parent_perplexity", "kl"), 2)
    write_json(workspace.results / "models/tiny.json", facts)
    prompts = [{"prompt": prompt} for prompt in ("Why?", "Tell me about tea.", "Any tips?")]
    write_jsonl(workspace.results / "prepare/prompts.jsonl", prompts)
    methods = {"genarm": GenArm(kind="genarm", strengths=(1.0, 0.5)), "mod": Policies(kind="mod")}
    return dataclasses.replace(
        smoke_params,
        objectives={"human_preference": Objective(label="human_preference")},
        arm=dataclasses.replace(smoke_params.arm, base="tiny"),
        sweep=Sweep(control="base", points=POINTS),
        tune=Tune(("tiny",), {"human_preference": Rival({"human_preference": 1.0})}),
        comparison=Comparison("comparison", ("tiny",), None, "genarm", methods),
        weak_to_strong=dataclasses.replace(smoke_params.weak_to_strong, weak=("tiny",), bases=("tiny",), best_of=2),
        decoding=dataclasses.replace(smoke_params.decoding, max_new_tokens=6, samples_per_prompt=2),
    )


def test_a_comparison_is_judged_by_whoever_judges(human, workspace, endpoint):
    params = dataclasses.replace(human, judge=asking(endpoint))
    comparison.run(params, workspace)
    out = workspace.results / "comparison"
    rows = pd.read_json(out / "rows.jsonl", lines=True)
    control = rows[rows.line == "base/base"].set_index(["prompt", "sample"]).response
    for row in rows.itertuples():
        other, own = len(control[row.prompt, row.sample]), len(row.response)
        assert row.human_preference == (own > other) + 0.5 * (own == other), "the endpoint prefers longer responses"
    texts = [(row.prompt, row.response, control[row.prompt, row.sample]) for row in rows.itertuples()]
    asked = sum(one != other for _, one, other in set(texts))
    assert 0 < len(endpoint.requests) == asked, "equal texts are a tie, and not asked about"
    table = pd.read_csv(out / "table.csv")
    assert (table[table.point == "base"].reward_human_preference == 0.5).all()
    assert {"genarm", "mod"} < set(table.method) and len(pd.read_csv(out / "fronts.csv")) == 3
    assert set(table.forwards_per_token[table.point == "a100"]) == {2}, "the base computes every token of MOD as well"
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "the share of verdicts won against “base”" in page and "oracle" not in page and KEY not in page


def test_a_ladder_is_judged_by_whoever_judges(human, workspace, endpoint):
    endpoint.reply = lambda body: "?" if "tea" in body["messages"][1]["content"] else longer(body)
    weak_to_strong.run(dataclasses.replace(human, judge=asking(endpoint)), workspace)
    out = workspace.results / "weak_to_strong"
    rows = pd.read_json(out / "rows.jsonl", lines=True).set_index(["point", "prompt", "sample"])
    best, plain = rows.loc["best_of_2/human_preference"], rows.loc["base"]
    known = best.human_preference.notna()
    assert known.any() and (best.human_preference[known] >= 0.5).all(), "the control's own response is one of the two"
    assert (plain.human_preference == 0.5).all()
    table = pd.read_csv(out / "table.csv").set_index("method")
    assert table.loc["control", "reward_human_preference"] == 0.5 and "best_of_2" in table.index
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "the share of verdicts won against “base”" in page and "oracle" not in page


@pytest.mark.parametrize("stage", [comparison, weak_to_strong])
@pytest.mark.parametrize(
    ("judge", "sentence"),
    [
        (OracleJudge(kind="oracle"), r"objectives\.human_preference has no scorer"),
        (RewardJudge(kind="reward_model", models={}), r"no reward model for human_preference"),
        (RewardJudge(kind="reward_model", models={"human_preference": Scoring("path", "away")}), "no folder away"),
        ({"rubrics": {}}, r"judge\.rubrics has none for human_preference"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
    ],
)
def test_a_judge_that_lacks_something_is_refused_before_anything_is_generated(
    human, workspace, endpoint, monkeypatch, stage, judge, sentence
):
    monkeypatch.setattr("pipeline.generation.rows.stored", lambda *_, **__: pytest.fail("rows were generated"))
    judge = asking(endpoint, **judge) if isinstance(judge, dict) else judge
    with pytest.raises(UserError, match=sentence):
        stage.run(dataclasses.replace(human, judge=judge), workspace)


def test_a_pairwise_judge_of_a_comparison_needs_an_unguided_control(human, workspace, endpoint):
    params = dataclasses.replace(human, judge=asking(endpoint), sweep=Sweep(control="a100", points=POINTS))
    with pytest.raises(UserError, match=r"sweep\.control a100 is guided: name an unguided point"):
        comparison.run(params, workspace)
