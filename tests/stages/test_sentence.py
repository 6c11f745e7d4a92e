"""From two sentences to a front: every stage on a tiny model, the dial mixed with one from a scorer, and below zero."""

import dataclasses
import json

import pandas as pd
import pytest

from pipeline.config.errors import UserError
from pipeline.data.files import read_jsonl
from pipeline.stages import explain, fetch, generate, judge, pareto, prepare, train

SMALL = (
    "base=tiny", "+models.tiny={source: path, location: '', dtype: float32}", "data.sampler=tiny", "tracking=disabled",
    "data.limits={train: 16, validation: 3, test: 4}", "data.sampling={responses_per_prompt: 2, max_new_tokens: 8}",
    "decoding.max_new_tokens=6", "judge.resamples=50", "explain.prompts=1",
)  # fmt: skip


@pytest.fixture
def composed(compose_params, tiny):
    def run(*overrides):
        params = compose_params(*SMALL, *overrides)
        spec = dataclasses.replace(params.models["tiny"], location=str(tiny))
        return dataclasses.replace(params, models={"tiny": spec})

    return run


def test_a_sentence_becomes_a_front_with_a_scorer_and_negative_weights(composed, workspace):
    params = composed(
        "experiment=sentence_and_scorer", "objectives.conciseness.tie=0.0", "objectives.conciseness.scorer=simplicity"
    )
    fetch.run(params, workspace, "tiny")
    prepare.run(params, workspace)
    for name in params.objectives:
        train.run(params, workspace, name)
    for stage in (generate, explain, judge, pareto):
        stage.run(params, workspace)
    front = pd.read_csv(workspace.results / "pareto/front.csv").set_index("point")
    assert front.loc["rude_and_concise", "alpha_politeness"] == -0.5 and front.score_politeness.between(0, 1).all()
    assert (front.loc[front.index != "base", "kl"] > 0).all() and front.loc["base", "kl"] == 0
    metrics = json.loads((workspace.results / "pareto/metrics.json").read_text())
    assert abs(metrics["mip"]["genarm_log_ratio"]) <= 1, "weights of both signs are shares by their size"
    sentences = params.objectives["politeness"]
    for file in workspace.results.rglob("*.json*"):
        assert sentences.wanted not in file.read_text(), f"{file} holds the sentence"
    rows = [row for _, row in read_jsonl(workspace.results / "generate/rows.jsonl")]
    assert {row["prompt"] for row in rows} <= {
        row["prompt"] for _, row in read_jsonl(workspace.results / "prepare/prompts.jsonl")
    }


def test_weights_of_minus_one_and_one_steer_apart(composed, workspace):
    """The log-ratio law at −α is the base where the ARM is the base, and its mirror elsewhere: checked by the KLs."""
    params = composed("objectives=sentence")
    fetch.run(params, workspace, "tiny")
    prepare.run(params, workspace)
    train.run(params, workspace, "politeness")
    generate.run(params, workspace)
    rows = pd.DataFrame([row for _, row in read_jsonl(workspace.results / "generate/rows.jsonl")])
    means = rows.groupby("point").kl.mean()
    assert means["base"] == 0 < means["plus_050"] < means["plus_100"] < means["plus_200"] and means["minus_100"] > 0


def test_too_few_pairs_stop_before_anything_is_written(composed, workspace):
    params = composed("objectives=sentence", "data.limits.train=4")
    fetch.run(params, workspace, "tiny")
    with pytest.raises(UserError, match=r"objectives.politeness: the two sentences yield \d usable training pairs"):
        prepare.run(params, workspace)
    assert not (workspace.results / "prepare").exists() and not workspace.classifiers.exists()
