import dataclasses
import json
import random
import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.errors import UserError
from pipeline.config.schema import Data, Objective
from pipeline.data.card import DataCard
from pipeline.data.labelling import label_samples, pair_of
from pipeline.data.preferences import Prompts, read_prompts, read_rows
from pipeline.data.splits import SPLITS, canonical, split_of
from pipeline.models.control_tokens import control_names
from pipeline.training.batches import tokenise
from tests.tiny import ROOT

QUICK = settings(max_examples=50, deadline=None, derandomize=True)
WARM, SHORT = Objective(label="warmer", tie=0.5), Objective(label="shorter", tie=0.1)
BOTH = {"warm": WARM, "short": SHORT}
SCORED = {
    "positivity": Objective(label="p", scorer="positivity", tie=0.5),
    "conciseness": Objective(label="c", scorer="conciseness", tie=0.1),
}
SIMPLER = Objective(label="s", scorer="simplicity", tie=0.03)
EVERYDAY = ROOT / "pipeline/data/prompts/everyday.jsonl"
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)


def labelled(prompt="Why?", **changes):
    row = {"prompt": prompt, "response_0": "yes", "response_1": "no", "warmer": 0, "shorter": 1}
    return {key: value for key, value in (row | changes).items() if value is not ...}


def chosen(prompt="Why?", **changes):
    row = {"prompt": prompt, "chosen": "yes", "rejected": "no", "objective": "warm"}
    return {key: value for key, value in (row | changes).items() if value is not ...}


def message(role, content):
    return {"role": role, "content": content}


ASKED, SAID = message("user", "Once more?"), message("assistant", "yes")


@pytest.fixture
def read(tmp_path):
    def run(*rows, objectives=BOTH, reader=read_rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = Data(path=str(path), sampler="", prompts=str(path), **options)
        if reader is read_prompts:
            return read_prompts(data, 0)
        run.card = DataCard(objectives, data.strict)
        return list(read_rows(data, objectives, 0, run.card))

    return run


def pairs_of(rows, name, objective, noise, seed):
    return [pair for row in rows if (pair := pair_of(row, name, objective, noise, seed)) is not None]


def unseen(data, rows):
    prompts = Prompts()
    for row in rows:
        prompts.add(row)
    return prompts.unseen(data)


def test_labelled_rows_are_read_with_every_objective_and_ties(read):
    rows = read(labelled(id="x", split="test"), labelled("How?", warmer=None, shorter=0, note="kept out"))
    assert rows[0] == labelled(id="x", split="test")
    assert (rows[1]["id"], rows[1]["warmer"], rows[1]["shorter"]) == ("2", None, 0)
    assert rows[1]["split"] in SPLITS


def test_chosen_and_rejected_become_labels_of_their_objective_only(read):
    rows = read(chosen(), chosen(prompt="How?", objective="short"))
    assert [(row["warmer"], row["shorter"]) for row in rows] == [(0, None), (None, 0)]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs_of(rows, "short", SHORT, 0.0, 0)] == [("yes", "no")]


@pytest.mark.parametrize(
    ("preference", "label"), [(1, 0), (2, 1), (1.2, 0), (1.9, 1), (1.5, None), (0, None), (None, None), ("2.0", 1)]
)
def test_annotations_of_alpaca_eval_are_labels(read, preference, label):
    annotation = {
        "instruction": "Why?", "output_1": "yes", "output_2": "no", "generator_1": "a", "generator_2": "b",
        "annotator": "gpt", "preference": preference,
    }  # fmt: skip
    [row] = read(annotation, objectives={"warm": WARM})
    texts = {"prompt": "Why?", "response_0": "yes", "response_1": "no"}
    assert texts.items() <= row.items() and row["warmer"] == label
    [row] = read({**annotation, "objective": "short"})
    assert row["shorter"] == label and row["warmer"] is None


def test_an_annotation_beyond_its_scale_is_refused_with_its_line(read):
    annotation = {"instruction": "Why?", "output_1": "yes", "output_2": "no", "preference": 3, "objective": "warm"}
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: preference is 3: alpaca_eval has 1 to 2"):
        read(annotation)


def test_a_single_objective_need_not_be_named(read):
    row = {key: value for key, value in chosen().items() if key != "objective"}
    assert read(row, objectives={"warm": WARM})[0]["warmer"] == 0
    with pytest.raises(UserError, match="line 1: objective is None: use one of warm, short"):
        read(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (labelled(shorter=...), "the objective short has no label column shorter"),
        (labelled(id="first"), "the id first was there before"),
        (labelled(prompt=3), "prompt is 3: it must be a text or a list of messages"),
        (labelled(response_1=...), "no column response_1, only prompt, response_0"),
        (labelled(response_1=["no"]), "response_1 is ['no']: it must be a text"),
        (labelled(warmer=True), "warmer is True: use 0, 1, or null"),
        (labelled(warmer=2), "warmer is 2: use 0, 1, or null"),
        (labelled(warmer="x"), "warmer is 'x': use 0, 1, or null"),
        (labelled(warmer=[0]), "warmer is [0]: use 0, 1, or null"),
        (labelled(split="dev"), "split is 'dev': use one of train, validation, test"),
        (chosen(objective="kind"), "objective is 'kind': use one of warm, short"),
        (chosen(rejected=3), "rejected is 3: it must be a text"),
        (chosen(system=3), "system is 3: it must be a text"),
        (chosen(score_chosen={}), "score_chosen is {}: use a number or null"),
        (chosen(chosen_ended=3), "chosen_ended is 3: use true or false"),
        (labelled(ended_1="no"), "ended_1 is 'no': use true or false"),
        (labelled(warmer=10**400), "warmer is 1000"),
    ],
)
def test_a_faulty_row_is_named_by_file_and_line(read, tmp_path, row, reason):
    good = labelled("Once?", id="first", split="train")
    with pytest.raises(UserError) as refused:
        read(good, row)
    assert str(refused.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 2: {reason}")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (labelled(response_1="yes"), "equal responses"),
        (labelled(response_1="  yes\n"), "equal responses"),
        (labelled(prompt="  "), "an empty prompt"),
        (labelled(response_0=""), "an empty response"),
        (labelled(response_1=None), "an empty response"),
        (chosen(chosen=""), "an empty chosen"),
        (chosen(rejected=None), "an empty rejected"),
        (chosen(rejected="yes"), "equal responses"),
        (labelled("Once?"), "a row that was there before"),
        (labelled("Once?", response_0="no", response_1="yes", warmer=1, shorter=0), "a row that was there before"),
        (labelled(" Once?\n"), "a row that was there before"),
        (labelled("Once?", warmer=1), "a row that was there before with another label"),
        (labelled("Once?", response_0="no", response_1="yes"), "a row that was there before with another label"),
        (labelled("Once?", warmer=None), "a row that was there before with another label"),
        (labelled("Held out?", split="train", response_1="maybe"), "a prompt that is in split test as well"),
        (labelled("Held  out?\r\n", split="train", response_1="maybe"), "a prompt that is in split test as well"),
        (chosen(prompt=...), "texts that share no prompt"),
        (chosen(prompt=..., chosen="\n\nHuman: a", rejected="\n\nHuman: b"), "transcripts that share no answer"),
        (chosen(prompt=None, chosen="I like dogs.", rejected="I like cats."), "an empty prompt"),
        (chosen(prompt=None, chosen=[ASKED, SAID]), "an empty prompt"),
        (chosen(prompt="Who?", chosen=[ASKED, SAID]), "a prompt that its messages contradict"),
        (chosen(prompt=[message("user", "Who?")], chosen=[ASKED, SAID]), "a prompt that its messages contradict"),
        (
            chosen(system="Shout.", chosen=[message("system", "Hush."), message("user", "Why?"), SAID]),
            "a system text that its messages contradict",
        ),
        (chosen(chosen=[message("assistant", None)]), "a message that calls a tool or has no text"),
        (chosen(chosen=[{"role": "assistant"}]), "a message that calls a tool or has no text"),
        (chosen(chosen=[SAID | {"tool_calls": [{"name": "f"}]}]), "a message that calls a tool or has no text"),
        (chosen(prompt=[message("user", [{"type": "image"}])]), "a message of something else than text"),
        (chosen(prompt=str([ASKED])), "a list of messages written as a text"),
        (chosen(chosen=json.dumps([SAID])), "a list of messages written as a text"),
        (chosen(score_chosen=1.0, score_rejected=9.0), "a rejected response with the higher score"),
        (chosen(prompt="Why \ud83d?"), "half a character in the prompt"),
        (chosen(chosen=[message("assistant", "\ud83d")]), "half a character in the chosen"),
        (labelled(response_1="\ud83d"), "half a character in the response"),
        (labelled(id="\ud83d"), "half a character in the id"),
        (chosen(prompt=[{"role": "tool", "content": "x"}]), "a message of the role tool"),
        (chosen(prompt=[{"role": "assistant", "content": "x"}]), "a prompt that no user asks"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_counted_and_with_strict_refused(read, tmp_path, row, reason):
    good = labelled("Once?", id="first", split="train"), labelled("Held out?", split="test")
    assert [kept["prompt"] for kept in read(*good, row)] == ["Once?", "Held out?"]
    counted = read.card.summary()["dropped"]
    assert counted == {reason: {"rows": 1, "such as": [f"{tmp_path / 'rows.jsonl'}, line 3"]}}
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 3: {reason}: correct or remove it, or set data\.strict"):
        read(*good, row, strict=True)


def test_a_prompt_that_is_held_out_later_is_not_trained_on_earlier(read):
    early, held_out = labelled("Why?", split="train"), labelled("Why?", split="validation", response_1="maybe")
    assert [row["split"] for row in read(early, held_out)] == ["validation"]
    most = labelled("Why?", split="test", response_0="perhaps")
    assert [row["response_0"] for row in read(early, held_out, most)] == ["perhaps"]
    assert [row["split"] for row in read(labelled("Why?"), held_out)] == ["validation"] * 2, "no statement, no leak"


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_label_written_as_a_float_is_refused_or_understood(read, label):
    try:
        rows = read(labelled(warmer=label, split="train"))
    except UserError as refused:
        assert "line 1: warmer is" in str(refused)
    else:
        assert pairs_of(rows, "warm", WARM, 0.0, 0)[0]["chosen"] == ["yes", "no"][int(label)]


@pytest.mark.parametrize("same", ["Sky\u00e9?", "Skye\u0301?", " Sky\u00e9? ", "Sky\u00e9?\r\n", "\uff33ky\u00e9?"])
def test_a_prompt_in_another_spelling_falls_into_the_same_split_and_is_asked_once(read, same):
    assert canonical(same) == "Sky\u00e9?"
    halves = {"test_fraction": 0.4, "validation_fraction": 0.4}
    rows = read(labelled("Sky\u00e9?"), labelled(same, response_1="maybe"), **halves)
    assert len(rows) == 2 and rows[0]["split"] == rows[1]["split"]
    held_out = read(labelled("Sky\u00e9?", split="test"), labelled(same, response_1="maybe"), **halves)
    assert [row["split"] for row in held_out] == ["test", "test"]
    assert unseen(Data(path="x", sampler="", prompts="x"), held_out) == ["Sky\u00e9?"]
    with pytest.raises(UserError, match="line 2: the prompt of line 1 again"):
        read({"prompt": "Sky\u00e9?"}, {"prompt": same}, reader=read_prompts)


def test_texts_with_a_zero_byte_are_not_taken_for_others(read):
    assert len(read(chosen(prompt="p\0", chosen="a"), chosen(prompt="p", chosen="\0a"))) == 2


TURNS = [message("user", "7 x 8?"), message("assistant", "56"), message("user", "Twice?")]
SPELLED = "\n\nHuman: 7 x 8?\n\nAssistant: 56\n\nHuman: Twice?\n\nAssistant:"


@pytest.mark.parametrize(
    ("prompt", "before", "whole"),
    [
        (TURNS[:1], TURNS[1:], SPELLED),
        ("7 x 8?", TURNS[1:], SPELLED),
        (TURNS[:2], TURNS[2:], SPELLED),
        (TURNS, [], SPELLED),
        (..., TURNS, SPELLED),
        (None, TURNS, SPELLED),
        ("7 x 8? ", TURNS, SPELLED),
        ("Twice?", TURNS, SPELLED),
        (SPELLED, TURNS, SPELLED),
        (SPELLED, [], SPELLED),
        (TURNS[:1], TURNS[:1], "7 x 8?"),
        ("7 x 8?", [], "7 x 8?"),
        ([message("user", [{"type": "text", "text": "7 x"}, {"type": "text", "text": " 8?"}])], [], "7 x 8?"),
    ],
)
def test_a_prompt_and_the_turns_beside_it_become_one_dialogue(read, prompt, before, whole):
    answers = {side: [*before, message("assistant", side)] for side in ("chosen", "rejected")}
    (row,) = read(chosen(prompt=prompt, **answers))
    assert [row[key] for key in ("prompt", "response_0", "response_1")] == [whole, "chosen", "rejected"]
    if prompt not in (..., None):
        (row,) = read(labelled(prompt, response_0=answers["chosen"], response_1=answers["rejected"]))
        assert [row[key] for key in ("prompt", "response_0", "response_1")] == [whole, "chosen", "rejected"]


def test_a_system_text_stands_before_the_prompt(read):
    kind, first = "\n\nSystem: Be kind.", "\n\nHuman: Why?\n\nAssistant:"
    told = [message("system", "Be kind."), message("user", "Why?"), SAID]
    for row in (
        chosen(system="Be kind."),
        chosen(system="Be kind.", prompt=[message("user", "Why?")]),
        chosen(system="Be kind.", prompt=..., chosen=told, rejected=[*told[:2], message("assistant", "no")]),
        chosen(system="Be kind.", prompt=first),
        labelled(system="Be kind."),
    ):
        assert read(row)[0]["prompt"] == kind + first
    assert read({"prompt": "Why?", "system": "Be kind."}, reader=read_prompts)[0]["prompt"] == kind + first
    assert read(chosen(system=None), chosen("How?", system=" "))[1]["prompt"] == "How?"
    named = chosen(instruction="Be kind.")
    assert read(named, columns={"system": "instruction"})[0]["prompt"] == kind + first


@pytest.mark.parametrize("label", ["1", "1.0", 1.0, 1])
def test_a_number_may_be_the_text_that_a_table_has_of_it(read, label):
    assert read(labelled(warmer=label))[0]["warmer"] == 1
    assert read(chosen(score_chosen=label, score_rejected="1"))[0]["warmer"] is None


def test_an_objective_that_is_no_text_is_refused_with_its_line(read):
    with pytest.raises(UserError, match="line 1: objective is"):
        read(chosen(objective=["warm"]))


def test_prompts_are_read_with_stable_ids(read):
    rows = [{"prompt": "Why?", "split": "test"}, {"prompt": "How?"}]
    first, second = read(*rows, reader=read_prompts), read(*rows[::-1], reader=read_prompts)
    assert first == second[::-1]
    assert first[0]["split"] == "test"
    assert len({prompt["id"] for prompt in first}) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Why?"}, "line 3: the prompt of line 1 again"),
        ({"text": "x"}, "line 3: no column prompt, only text"),
        ({"prompt": " "}, "line 3: an empty prompt: correct or remove the line"),
        ({"prompt": "x", "split": "dev"}, "line 3: split is 'dev'"),
    ],
)
def test_faulty_prompts_are_named_by_line(read, row, reason):
    with pytest.raises(UserError, match=reason):
        read({"prompt": "Why?"}, {"prompt": "How?"}, row, reader=read_prompts)


@QUICK
@given(prompts=st.lists(TEXTS.filter(str.strip), min_size=2, max_size=8, unique_by=canonical), data=st.data())
def test_splits_are_stable_and_shared_by_all_rows_of_a_prompt(tmp_path_factory, prompts, data):
    def splits(rows):
        path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = Data(path=str(path), sampler="", prompts=str(path), validation_fraction=0.3, test_fraction=0.3)
        found = list(read_rows(data, BOTH, 0, DataCard(BOTH)))
        assert len(found) == len(rows)
        return {(row["prompt"], row["split"]) for row in found}

    few = [labelled(prompt) for prompt in prompts[:-1]]
    others = [labelled(prompt, response_1="maybe") for prompt in prompts[:-1]]
    more = data.draw(st.permutations([*few, *others, labelled(prompts[-1])]))
    assert splits(few) <= splits(more)
    assert len(splits(more)) == len(prompts)


def test_splits_have_their_shares_and_depend_on_the_seed():
    data, prompts = (
        Data(path="", sampler="", prompts="", validation_fraction=0.1, test_fraction=0.2),
        [f"prompt {n}" for n in range(5000)],
    )
    found = [split_of(prompt, data, 0) for prompt in prompts]
    assert found.count("test") / len(found) == pytest.approx(0.2, abs=0.02)
    assert found.count("validation") / len(found) == pytest.approx(0.1, abs=0.02)
    assert found != [split_of(prompt, data, 1) for prompt in prompts]


def sampled():
    words = ["wonderful", "awful", "day", "I love", "tea", "and hate", "extraordinarily", "rain", "happy"]
    dice = random.Random(0)
    prompts = [{"id": f"p{n}", "prompt": f"prompt {n}", "split": SPLITS[n % 3]} for n in range(30)]
    return prompts, {
        row["id"]: [(" ".join(dice.choices(words, k=dice.randint(3, 30))) + ".", n < 3) for n in range(4)]
        for row in prompts
    }


def test_a_third_objective_leaves_the_pairs_of_the_other_two_alone():
    prompts, responses = sampled()
    two = list(label_samples(prompts, responses, SCORED))
    three = list(label_samples(prompts, responses, {"simplicity": SIMPLER, **SCORED}))
    for name, objective in SCORED.items():
        assert pairs_of(two, name, objective, 0.2, 0) == pairs_of(three, name, objective, 0.2, 0) != []
    assert pairs_of(three, "simplicity", SIMPLER, 0.0, 0)
    assert len(two) == len(prompts) * 6


def test_oracles_prefer_the_higher_score_and_shrug_within_a_tie():
    prompts = [{"id": "p", "prompt": "Why?", "split": "train"}]
    texts = [
        "one two three four.",
        "one two three four five.",
        "one two " + "three " * 18 + ".",
        "",
        "one two three four.",
    ]
    samples = [(text, True) for text in texts]
    short = {"short": Objective(label="c", scorer="conciseness", tie=0.1)}
    rows = list(label_samples(prompts, {"p": samples}, short))
    assert [(row["id"], row["c"]) for row in rows] == [("p-01", None), ("p-02", 0), ("p-12", 0)]
    exact = list(label_samples(prompts, {"p": samples}, {"short": Objective(label="c", scorer="conciseness")}))
    assert [row["c"] for row in exact] == [0, 0, 0]
    backwards = list(label_samples(prompts, {"p": samples[2::-1]}, short))
    assert [row["c"] for row in backwards] == [1, 1, None]


def test_equal_scores_are_a_tie_even_without_a_margin():
    prompts = [{"id": "p", "prompt": "Why?", "split": "train"}]
    rows = label_samples(
        prompts, {"p": [("a b", True), ("c d", True)]}, {"short": Objective(label="c", scorer="conciseness")}
    )
    assert [row["c"] for row in rows] == [None]


def noisy_rows(count=6000):
    return [
        {"id": str(n), "prompt": str(n), "split": SPLITS[n % 3], "response_0": "a", "response_1": "b", "warmer": n % 2}
        for n in range(count)
    ]


def flipped(noise, seed=0, name="warm"):
    rows = noisy_rows()
    pairs = pairs_of(rows, name, WARM, noise, seed)
    assert [pair["id"] for pair in pairs] == [row["id"] for row in rows]
    return {
        (row["split"], row["id"])
        for row, pair in zip(rows, pairs, strict=True)
        if pair["chosen"] != row[f"response_{row['warmer']}"]
    }


def test_without_noise_every_label_stands():
    assert flipped(0.0) == set()


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_noise_flips_its_share_of_train_and_validation_and_never_a_test_label(noise):
    splits = [split for split, _ in flipped(noise)]
    assert splits.count("train") / 2000 == pytest.approx(noise, abs=0.04)
    assert splits.count("validation") / 2000 == pytest.approx(noise, abs=0.04)
    assert splits.count("test") == 0


def test_noise_grows_by_flipping_more_and_every_objective_and_seed_has_its_own_coins():
    assert flipped(0.1) < flipped(0.3)
    assert flipped(0.3, seed=1) != flipped(0.3) != flipped(0.3, name="short")


def test_pairs_leave_ties_out_and_put_the_preferred_first():
    rows = [labelled(id=str(n), split="train", warmer=label) for n, label in enumerate((1, None, 0))]
    both = {"prompt": "Why?", "split": "train", "chosen_ended": True, "rejected_ended": True}
    assert pairs_of(rows, "warm", WARM, 0.0, 0) == [
        {"id": "0", "chosen": "no", "rejected": "yes", **both},
        {"id": "2", "chosen": "yes", "rejected": "no", **both},
    ]


@pytest.mark.parametrize(
    ("texts", "noise"), [(["love", "hate"], 0.0), (["hate", "love"], 0.0), (["love", "hate"], 1.0)]
)
def test_whether_a_response_ended_goes_with_its_text_into_the_tokens(prompter, texts, noise):
    prompts = [{"id": "p", "prompt": "Why?", "split": "train"}]
    samples = {"p": [(text, text == "love") for text in texts]}
    rows = list(label_samples(prompts, samples, {"warm": Objective(label="p", scorer="positivity")}))
    found = pairs_of(rows, "warm", Objective(label="p"), noise, 0)
    assert [found[0][f"{side}_ended"] for side in ("chosen", "rejected")] == ([False, True] if noise else [True, False])
    responses = tokenise(found, prompter, 256, "pairs.jsonl").groups[0].responses
    ended, cut = responses[::-1] if noise else responses
    assert ended == [*prompter.tokenizer("love", add_special_tokens=False).input_ids, prompter.eos]
    assert cut == prompter.tokenizer("hate", add_special_tokens=False).input_ids


@pytest.mark.parametrize("cut", [False, "False", "0"])
def test_own_responses_may_say_that_they_were_cut_and_teach_no_end_then(read, prompter, cut):
    rows = read(
        chosen(split="train", chosen_ended=cut, rejected_ended=True),
        labelled("How?", split="train", warmer=1, ended_0=cut),
        chosen(prompt="Who?", split="train", chosen_ended=None),
    )
    pairs = pairs_of(rows, "warm", WARM, 0.0, 0)
    assert [(pair["chosen_ended"], pair["rejected_ended"]) for pair in pairs] == [
        (False, True), (True, False), (True, True),
    ]  # fmt: skip
    groups = tokenise(pairs, prompter, 256, "pairs.jsonl").groups
    ends = [[response[-1] == prompter.eos for response in group.responses] for group in groups]
    assert ends == [[False, True], [True, False], [True, True]]


def test_limits_keep_all_rows_of_the_first_prompts_of_a_split(read):
    told = ("a1", "a2", "b1", "a3", "a1", "c1", "b1", "a2", "a3")
    rows = [
        labelled(prompt, response_0=f"text {n}", split=SPLITS["abc".index(prompt[0])]) for n, prompt in enumerate(told)
    ]
    two = dict.fromkeys(SPLITS, 2)
    assert [row["prompt"] for row in read(*rows, limits=two)] == ["a1", "a2", "b1", "a1", "c1", "b1", "a2"]
    assert [row["prompt"] for row in read(*rows, limits={"train": 1})] == ["a1", "b1", "a1", "c1", "b1"]
    assert len(read(*rows)) == len(rows)


def carded(*rows, objectives=BOTH):
    card = DataCard(objectives)
    for row in rows:
        card.keep(row, {name: pair_of(row, name, objective, 0.0, 0) for name, objective in objectives.items()})
    return card.summary()


def test_the_data_card_counts_rows_prompts_pairs_ties_conflicts_and_what_is_longer():
    labels = enumerate(((1, 1), (None, 1), (0, 1), (1, 0)))
    card = carded(*(labelled(id=str(n), split="train", warmer=warm, shorter=short) for n, (warm, short) in labels))
    assert (card["read"], card["rows"], card["prompts"]) == (4, {"train": 4}, {"train": 1})
    assert card["objectives"]["warm"] == {"pairs": {"train": 3}, "ties": 1, "longer_preferred": 0.3333}
    assert card["conflicts"] == {"warm, short": {"rows": 3, "rate": 0.6667}}
    assert card["characters"] == {
        "prompt": {"median": 4, "p99": 4, "longest": 4},
        "response": {"median": 2, "p99": 3, "longest": 3},
    }


def test_names_of_control_tokens_in_texts_are_counted(tiny, tmp_path):
    names = control_names(tiny)
    assert names == {"<pad>", "<end>", "<user>", "<reply>"}
    card = DataCard(BOTH, control=names)
    for text in ("It ends a turn: <end>. See?", "no end"):
        card.keep(labelled(response_0=text, split="train"), {})
    assert card.summary()["oddities"] == {"names of control tokens": 1}
    with pytest.raises(UserError, match=r"tokenizer\.json is missing or damaged"):
        control_names(tmp_path)


@pytest.mark.parametrize(
    ("text", "oddity"),
    [
        ("caf\ufffd", "replacement characters"),
        ("a\x00b", "control characters"),
        ("cafÃ©", "wrongly decoded text"),
        ("I hope itâ€™s clear enough", "wrongly decoded text"),
        ("這是一個中文的回答", "mostly other than Latin letters"),
        ("naïve café, “quoted”, 3 €\n\tdone", None),
    ],
)
def test_oddities_are_counted(text, oddity):
    card = carded(labelled(id="x", response_0=text, response_1=text + "!", split="train"))
    assert card["oddities"] == ({} if oddity is None else {oddity: 1})


def test_the_embedded_prompts_are_many_and_their_splits_share_nothing():
    rows = [json.loads(line) for line in EVERYDAY.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 160
    assert len({row["subject"] for row in rows}) == len(rows)
    subjects = {split: {row["subject"].lower() for row in rows if row["split"] == split} for split in SPLITS}
    assert all(subjects.values())
    assert all(a.isdisjoint(b) for a, b in combinations(subjects.values(), 2))
    words = [(row["split"], set(re.findall(r"\w+", row["prompt"].lower()))) for row in rows]
    near = [(a, b) for (one, a), (two, b) in combinations(words, 2) if one != two and len(a & b) / len(a | b) > 0.6]
    assert near == []
    assert all(row["subject"].lower() in row["prompt"].lower() for row in rows)


def test_the_embedded_prompts_are_read_with_their_own_splits():
    rows = [json.loads(line) for line in EVERYDAY.read_text(encoding="utf-8").splitlines()]
    read = read_prompts(Data(path=str(EVERYDAY), sampler="", prompts=str(EVERYDAY)), 0)
    assert [(row["prompt"], row["split"]) for row in read] == [(row["prompt"], row["split"]) for row in rows]


def test_prompts_to_generate_from_are_the_test_split_or_those_of_another_file(tmp_path):
    data = Data(path="data.jsonl", sampler="", prompts="data.jsonl")
    rows = [
        {"prompt": "Why?", "split": "train"},
        {"prompt": "How?", "split": "test"},
        {"prompt": "How?", "split": "test"},
    ]
    assert unseen(data, rows) == ["How?"]
    file = tmp_path / "more.jsonl"
    other = dataclasses.replace(data, prompts=str(file))
    file.write_text('{"prompt": "Who?"}\n{"prompt": "How?"}\n')
    assert unseen(other, rows) == ["Who?", "How?"]
    file.write_text('{"prompt": "Who?"}\n{"prompt": "Why?"}\n')
    with pytest.raises(UserError, match=r"more\.jsonl, line 2: the ARMs have seen this prompt in data\.jsonl"):
        unseen(other, rows)
    file.write_text('{"prompt": "Who?"}\n{"prompt": "Who?"}\n')
    with pytest.raises(UserError, match=r"more\.jsonl, line 2: the prompt is there already"):
        unseen(other, rows)


def test_the_prompts_of_the_ladder_are_unknown_to_the_embedded_data():
    embedded = Data(path=str(EVERYDAY), sampler="", prompts=str(EVERYDAY.with_name("unseen.jsonl")))
    assert len(unseen(embedded, read_prompts(embedded, 0))) == 200
