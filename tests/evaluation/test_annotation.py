"""Preferences from a judge: what it answers becomes labels, and what it does not is counted."""

import dataclasses
import json

import pytest

from pipeline.config.errors import UserError
from pipeline.config.judges import LlmJudge
from pipeline.config.schema import Objective, Point
from pipeline.data.files import read_jsonl
from pipeline.stages import prepare
from tests.endpoint import KEY, Server, longer


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def annotated(smoke_params, workspace, tiny, endpoint):
    workspace.models.mkdir()
    workspace.model("tiny").symlink_to(tiny)

    def run(**settings):
        annotator = LlmJudge(
            kind="llm",
            base_url=endpoint.url,
            model="m",
            api_key_env="JUDGE_KEY",
            rubrics={"length": "overall"},
            **settings,
        )
        return dataclasses.replace(
            smoke_params,
            objectives={"length": Objective(label="preferred_length", annotator=annotator)},
            data=dataclasses.replace(smoke_params.data, limits={"train": 2, "validation": 1, "test": 1}),
            sweep=dataclasses.replace(smoke_params.sweep, control="base", points={"base": Point()}),
        )

    return run


def test_a_judge_labels_samples_in_both_orders_and_is_never_asked_twice(annotated, workspace, endpoint):
    params = annotated()
    prepare.run(params, workspace)
    pairs = [row for _, row in read_jsonl(workspace.results / "prepare/pairs/length.jsonl")]
    assert pairs and all(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
    card = json.loads((workspace.results / "prepare/data_card.json").read_text())["objectives"]["length"]
    assert card["annotator"] == {"labelled": len(pairs), "ties": 24 - len(pairs), "undetermined": 0}
    assert len(endpoint.requests) == 48, "24 pairs of responses in both orders"
    prepare.run(params, workspace)
    assert len(endpoint.requests) == 48, "an answer was paid for twice"


def test_a_judge_that_prefers_a_place_labels_nothing_and_one_without_a_verdict_is_counted(
    annotated, workspace, endpoint
):
    endpoint.reply = lambda body: longer(body).rsplit(":", 1)[0] + ": A"
    with pytest.raises(UserError, match="no pair for length"):
        prepare.run(annotated(), workspace)
    (workspace.scratch / "store/verdicts.jsonl").unlink()
    answered = []

    def sometimes(body):
        answered.append(body)
        return "I would rather not say." if len(answered) <= 2 else longer(body)

    endpoint.reply = sometimes
    prepare.run(annotated(concurrency=1), workspace)
    card = json.loads((workspace.results / "prepare/data_card.json").read_text())["objectives"]["length"]
    assert card["source"] == "judge" and card["annotator"]["undetermined"] == 1
    assert sum(card["annotator"].values()) == 4 * 6


def test_without_a_key_nothing_is_sampled_and_a_used_up_budget_keeps_its_answers(
    annotated, workspace, endpoint, monkeypatch
):
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="JUDGE_KEY is not set"):
        prepare.run(annotated(), workspace)
    assert not (workspace.scratch / "store/prepare.jsonl").exists()
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with pytest.raises(UserError, match=r"max_calls=5 is reached and 43 questions"):
        prepare.run(annotated(max_calls=5), workspace)
    prepare.run(annotated(), workspace)
    assert len(endpoint.requests) == 48


def test_an_annotator_needs_a_rubric_and_an_unknown_key_is_named_with_its_place(compose_params):
    judged = ("objectives=positivity", "~sweep.points", "+sweep.points={base: {weights: {}}}", "sweep.control=base")
    sentences = ("objectives.positivity.wanted=null", "objectives.positivity.unwanted=null")
    asked = (*judged, *sentences, "data.sampling.responses_per_prompt=2", "+judge@objectives.positivity.annotator=llm")
    params = compose_params(*asked)
    assert params.objectives["positivity"].source(params.data) == "judge"
    with pytest.raises(UserError, match=r"annotator.rubrics has none for positivity"):
        compose_params(*asked, "~objectives.positivity.annotator.rubrics.positivity")
    with pytest.raises(UserError, match=r"objectives.positivity.annotator.modle: did you mean .*annotator.model\?"):
        compose_params(*asked, "+objectives.positivity.annotator.modle=x")
