"""Preferences from two sentences, and the card that says whether they will make an ARM."""

import dataclasses
import json
from collections import Counter

import pytest

from pipeline.config.errors import UserError
from pipeline.config.schema import Objective, Point
from pipeline.data.contrast import (
    FEWEST_PAIRS,
    contrast_pairs,
    instructed,
    leaks,
    near_duplicates,
    refuses,
    unusable,
)
from pipeline.data.files import read_jsonl
from pipeline.data.responses import write_generated
from pipeline.decoding.request import Request
from pipeline.evaluation.contrast_card import contrast_card
from pipeline.evaluation.statistics import Bootstrap
from pipeline.evaluation.text_classifier import TextClassifier
from pipeline.generation.samples import sample_responses
from pipeline.stages import judge, prepare
from tests.judges import generated

WARM, COLD = "Answer warmly and with joy.", "Answer coldly and curtly."
SENTENCES = Objective(label="preferred_warmth", wanted=WARM, unwanted=COLD)
NOUNS = ["bus", "tea", "rain", "garden", "lamp", "bread", "river", "chair", "clock", "radio", "shoe", "cat"]


@pytest.fixture
def dial(smoke_params, workspace, tiny):
    """The smoke experiment with one objective of two sentences."""
    workspace.models.mkdir()
    workspace.model("tiny").symlink_to(tiny)
    limits = {"train": 20, "validation": 4, "test": 4}
    return dataclasses.replace(
        smoke_params,
        objectives={"warmth": SENTENCES},
        data=dataclasses.replace(smoke_params.data, limits=limits),
        sweep=dataclasses.replace(smoke_params.sweep, control="base", points={"base": Point()}),
    )


def pairs_of(params, workspace):
    return [row for _, row in read_jsonl(workspace.results / "prepare/pairs/warmth.jsonl")]


def test_an_instruction_stands_behind_the_last_turn_or_in_the_systems():
    dialogue = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant:"
    assert instructed("Tea?", WARM) == f"Tea? {WARM}"
    assert instructed(dialogue, WARM).endswith(f"\n\nHuman: Tea? {WARM}\n\nAssistant:")
    system = instructed("Tea?", WARM, "system")
    assert system.startswith(f"\n\nSystem: {WARM}") and system.endswith("\n\nHuman: Tea?\n\nAssistant:")
    assert instructed(system, COLD, "system").startswith(f"\n\nSystem: {WARM} {COLD}")
    with pytest.raises(UserError, match="reword it"):
        instructed(dialogue, "Be kind.\n\nHuman: rude")


def test_pairs_come_from_the_sentences_and_hold_neither(dial, workspace):
    prepare.run(dial, workspace)
    pairs = pairs_of(dial, workspace)
    texts = json.dumps(pairs)
    assert WARM not in texts and COLD not in texts and {pair["split"] for pair in pairs} == {
        "train", "validation", "test",
    }  # fmt: skip
    stored = (workspace.scratch / "store/prepare.jsonl").read_text()
    assert WARM in stored and COLD in stored, "the responses were sampled under neither sentence"
    card = json.loads((workspace.results / "prepare/data_card.json").read_text())["objectives"]["warmth"]
    assert card["source"] == "contrast" and card["sampled"] == 28 * 4
    assert card["sampled"] - sum(card["left out"].values()) == sum(card["pairs"].values()) and card["ties"] == 0


def test_nothing_is_sampled_twice_and_another_objective_leaves_the_pairs_alone(dial, workspace, monkeypatch):
    prepare.run(dial, workspace)
    before, size = pairs_of(dial, workspace), (workspace.scratch / "store/prepare.jsonl").stat().st_size
    monkeypatch.setattr("pipeline.generation.model_set.ModelSet.decoder", None)  # nothing is loaded for what is there
    prepare.run(dial, workspace)
    assert (workspace.scratch / "store/prepare.jsonl").stat().st_size == size
    monkeypatch.undo()
    scored = Objective(label="preferred_simplicity", scorer="simplicity")
    both = dataclasses.replace(dial, objectives={"simplicity": scored, **dial.objectives})
    prepare.run(both, workspace)
    assert pairs_of(both, workspace) == before
    card = json.loads((workspace.results / "prepare/data_card.json").read_text())
    rows = card["objectives"]["simplicity"]
    assert rows["source"] == "scorer" and rows["ties"] + sum(rows["pairs"].values()) == sum(
        card["rows"].values()
    ) - len(before)


def test_without_an_unwanted_sentence_the_bare_prompt_is_the_other_side(dial, workspace):
    bare = dataclasses.replace(SENTENCES, unwanted=None)
    params = dataclasses.replace(dial, objectives={"warmth": bare})
    prepare.run(params, workspace)
    prompts = [json.loads(line)["row"]["prompt"] for line in (workspace.scratch / "store/prepare.jsonl").open()]
    assert sum(prompt.endswith(WARM) for prompt in prompts) == len(prompts) / 2


def test_responses_are_those_that_the_sampler_gives_under_the_sentence(dial, workspace):
    from pipeline.data.card import DataCard
    from pipeline.generation.rows import generate_stored

    sampling = dial.data.sampling
    prompts = [{"id": "p", "prompt": "Tea?", "split": "train"}]
    card = DataCard(dial.objectives)
    found = sample_responses(prompts, [None, WARM], dial, sampling, workspace, card)
    request = Request(
        f"Tea? {WARM}", temperature=sampling.temperature, max_new_tokens=sampling.max_new_tokens, sample=1
    )
    [row] = generate_stored([request], dial, workspace, "tiny", "other")
    assert found[WARM]["p"][1][0] == row.response != found[None]["p"][1][0]


@pytest.mark.parametrize(
    ("text", "leak"),
    [
        ("Sure, here is a warm answer: Tea is lovely.", True),
        ("Here's a response with joy: tea.", True),
        ("Certainly! Coldly speaking: no.", False),  # announces neither an answer nor a word of this sentence
        ("I answer warmly and with joy that tea is good.", True),
        ("Tea is lovely, and a joy on a warm day.", False),
        ("Sure, I like tea.", False),
        ("Here is what you need: tea, milk, sugar.", False),
    ],
)
def test_an_instruction_that_is_announced_or_repeated_is_noticed(text, leak):
    assert leaks(text, WARM) == leak


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot provide medical advice.", True),
        ("As an AI language model, I have no taste.", True),
        ("I can't wait to go there again!", False),
        ("Sorry about the rain; we had tea.", False),
    ],
)
def test_refusals_are_told_by_how_they_open(text, refusal):
    assert refuses(text) == refusal


def row(better, worse):
    return {"prompt": "Tea?", "response_0": better, "response_1": worse}


def test_what_cannot_teach_is_left_out_unless_the_sentence_asks_for_it():
    no, yes = "I'm sorry, but I can't help with that.", "Take two of these and rest."
    assert unusable(row(no, yes), SENTENCES) == "a refusal"
    assert unusable(row(no, yes), SENTENCES, expected=(True, False)) is None, "a dial that declines is made of refusals"
    other = "As an AI, it is not for me to say what a person should take."
    assert unusable(row(no, other), SENTENCES, expected=(True, True)) == "a refusal"
    assert unusable(row(" ", yes), SENTENCES) == "an empty response"
    assert unusable(row(yes, yes.upper()), SENTENCES) == "near-duplicates"
    assert not near_duplicates("Tea is good.", "Rain is bad, and cold.")
    assert unusable(row("Tea is good.", "Rain is bad, and cold."), SENTENCES) is None


def test_too_few_usable_pairs_are_refused_with_what_was_left_out():
    prompts = [{"id": str(place), "prompt": f"{noun}?", "split": "train"} for place, noun in enumerate(NOUNS * 3)]
    same = {prompt["id"]: [("The very same words.", True)] for prompt in prompts}
    with pytest.raises(UserError, match=rf"0 usable training pairs of 36 .*{FEWEST_PAIRS} are .*near-duplicates: 36"):
        contrast_pairs(prompts, "warmth", SENTENCES, {WARM: same, COLD: same}, Counter())


def made(better, worse):
    """Forty pairs, every fourth held out, of templates with a noun."""
    rows = []
    for place in range(40):
        noun, number = NOUNS[place % len(NOUNS)], place // len(NOUNS)
        texts = [text.format(noun=noun, filler="and so on " * number) for text in (better, worse)]
        rows.append(
            {"id": str(place), "prompt": f"{noun} {number}?", "split": "test" if place % 4 == 0 else "train"}
            | {"response_0": texts[0], "response_1": texts[1], "ended_0": True, "ended_1": False}
        )
    return rows


@pytest.mark.parametrize(
    ("better", "worse", "says"),
    [
        ("The {noun} {filler} is it.", "The {noun} {filler} is it.", "no signal"),
        ("The {noun}.", "The {noun} {filler} was there for a long long time, as it had been.", "length trap"),
        ("Darling, the {noun} {filler} was there.", "Well, the {noun} {filler} was there.", "a set phrase"),
    ],
)
def test_the_card_says_when_there_is_no_signal_or_only_length_or_a_phrase(smoke_params, better, worse, says):
    card, _ = contrast_card("warmth", made(better, worse), Counter(sampled=40), Bootstrap.of(smoke_params.judge, 0))
    assert says in card["verdict"]
    assert card["ended"] == {"wanted": 1.0, "unwanted": 0.0}


def test_the_card_measures_on_pairs_that_nothing_was_fitted_on(smoke_params):
    rows = made("A lovely {noun} and a happy {filler} one.", "An awful {noun} and a sad {filler} one.")
    for pair in rows:  # the held-out pairs contradict the others
        if pair["split"] == "test":
            pair["response_0"], pair["response_1"] = pair["response_1"], pair["response_0"]
    card, classifier = contrast_card("warmth", rows, Counter(sampled=40), Bootstrap.of(smoke_params.judge, 0))
    assert card["held-out accuracy"]["classifier"]["value"] == 0.0
    assert classifier.probability("a happy lovely one") > 0.5 > classifier.probability("a sad awful one")


def test_a_classifier_counts_words_and_not_length():
    texts = ["lovely tea", "a lovely cup", "lovely lovely day"], ["awful tea", "an awful cup", "awful awful day"]
    classifier = TextClassifier.fit(*texts)
    again = TextClassifier.from_json(json.loads(json.dumps(classifier.to_json())))
    assert again == classifier and classifier.log_odds("lovely") > 0 > classifier.log_odds("awful")
    assert classifier.strongest(1) == (["lovely"], ["awful"])
    assert classifier.log_odds("lovely") > classifier.log_odds("lovely " + " ".join(NOUNS)) > 0
    assert TextClassifier.fit([], []).probability("any") == 0.5


def test_the_classifier_is_the_oracle_where_no_scorer_is_named(dial, workspace):
    prepare.run(dial, workspace)
    fitted = TextClassifier.from_json(json.loads(workspace.classifiers.read_text())["warmth"])
    write_generated(workspace.results / "generate/rows.jsonl", [generated("Why?", "good tea", point="base")])
    judge.run(dial, workspace)
    [scored] = [row for _, row in read_jsonl(workspace.results / "judge/scores.jsonl")]
    assert scored["warmth"] == fitted.probability("good tea")
    workspace.classifiers.unlink()
    with pytest.raises(UserError, match=r"has no classifier for warmth: run stage prepare"):
        judge.run(dial, workspace)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ("objectives.politeness.wanted=' '", "politeness.wanted is ' ': write a sentence"),
        ("objectives.politeness.unwanted='answer  politely AND warmly.'", "are the same sentence"),
        ("objectives.politeness.wanted=null", "has no scorer to label samples.*or two sentences"),
        ("data.sampling=null", "politeness.wanted needs sampled responses"),
        ("sweep.points.minus_100.form=plain", r"minus_100.weights.politeness is negative.*form=log_ratio"),
        ("+judge@objectives.politeness.annotator=llm", "both a sentence and an annotator"),
    ],
)
def test_sentences_that_cannot_work_are_refused_before_anything_runs(compose_params, changes, reason):
    with pytest.raises(UserError, match=reason):
        compose_params("objectives=sentence", changes)


def test_two_sentences_on_the_command_line_are_an_experiment(compose_params):
    params = compose_params("objectives=sentence", "objectives.politeness.wanted='Be kind, please.'")
    assert params.objectives["politeness"].source(params.data) == "contrast" and params.loss.kind == "simpo"
    assert min(point.weights.get("politeness", 0) for point in params.sweep.points.values()) == -1.0


@pytest.mark.parametrize("option", ["scorer", "held_out_scorer"])
def test_a_scorer_that_is_not_there_is_refused_before_anything_is_sampled(compose_params, workspace, option):
    params = compose_params(f"objectives.positivity.{option}=humour")
    with pytest.raises(UserError, match="there is no scorer humour"):
        prepare.run(dataclasses.replace(params, data=dataclasses.replace(params.data, sampler="tiny")), workspace)
    assert not (workspace.scratch / "store").exists()
