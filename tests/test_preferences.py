import dataclasses
import json
import random
import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import preferences
from pipeline.config import Data, Objective, UserError
from pipeline.pairs import tokenise
from pipeline.preferences import (
    SPLITS,
    label_samples,
    limited,
    pairs_of,
    read_prompts,
    read_rows,
    split_of,
    unseen_prompts,
)
from tests.tiny import ROOT

QUICK = settings(max_examples=50, deadline=None, derandomize=True)
WARM, SHORT = Objective(label="warmer", tie=0.5), Objective(label="shorter", tie=0.1)
BOTH = {"warm": WARM, "short": SHORT}
SCORED = {
    "positivity": Objective(label="p", scorer="positivity", tie=0.5),
    "conciseness": Objective(label="c", scorer="conciseness", tie=0.1),
}
SIMPLER = Objective(label="s", scorer="simplicity", tie=0.03)
EVERYDAY = ROOT / "pipeline/prompts/everyday.jsonl"
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)


def labelled(prompt="Why?", **changes):
    row = {"prompt": prompt, "response_0": "yes", "response_1": "no", "warmer": 0, "shorter": 1}
    return {key: value for key, value in (row | changes).items() if value is not ...}


def chosen(**changes):
    return {"prompt": "Why?", "chosen": "yes", "rejected": "no", "objective": "warm"} | changes


@pytest.fixture
def read(tmp_path):
    def run(*rows, objectives=BOTH, reader=read_rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = Data(path=str(path), sampler="", prompts=str(path), **options)
        return reader(data, 0) if reader is read_prompts else reader(data, objectives, 0)

    return run


def test_labelled_rows_are_read_with_every_objective_and_ties(read):
    rows = read(labelled(id="x", split="test"), labelled("How?", warmer=None, shorter=0, note="kept out"))
    assert rows[0] == labelled(id="x", split="test")
    assert (rows[1]["id"], rows[1]["warmer"], rows[1]["shorter"]) == ("2", None, 0)
    assert rows[1]["split"] in SPLITS


def test_chosen_and_rejected_become_labels_of_their_objective_only(read):
    rows = read(chosen(), chosen(prompt="How?", objective="short"))
    assert [(row["warmer"], row["shorter"]) for row in rows] == [(0, None), (None, 0)]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs_of(rows, "short", SHORT, 0.0, 0)] == [("yes", "no")]


def test_a_single_objective_need_not_be_named(read):
    row = {key: value for key, value in chosen().items() if key != "objective"}
    assert read(row, objectives={"warm": WARM})[0]["warmer"] == 0
    with pytest.raises(UserError, match="line 1: objective is None: use one of warm, short"):
        read(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (labelled(shorter=...), "the objective short has no label column shorter"),
        (labelled(id="first"), "the id first of line 1 again"),
        (labelled(response_1="yes"), "the two responses are equal"),
        (labelled(response_1="  yes\n"), "the two responses are equal"),
        (labelled(prompt="  "), "prompt must be a non-empty text"),
        (labelled(prompt=3), "prompt must be a non-empty text"),
        (labelled(response_0=""), "response_0 must be a non-empty text"),
        (labelled(response_1=...), "response_1 must be a non-empty text"),
        (labelled(warmer=True), "warmer is True: use 0, 1, or null"),
        (labelled(warmer=2), "warmer is 2: use 0, 1, or null"),
        (labelled(warmer="x"), "warmer is 'x': use 0, 1, or null"),
        (labelled(warmer=[0]), "warmer is [0]: use 0, 1, or null"),
        (labelled(split="dev"), "split is 'dev': use one of train, validation, test"),
        (labelled("Once?", split="test"), "its prompt is in split train at line 1 and in test here"),
        (chosen(objective="kind"), "objective is 'kind': use one of warm, short"),
        (chosen(chosen=""), "chosen must be a non-empty text"),
        (chosen(rejected=None), "rejected must be a non-empty text"),
        (chosen(rejected="yes"), "the two responses are equal"),
    ],
)
def test_a_faulty_row_is_named_by_file_and_line(read, tmp_path, row, reason):
    good = labelled("Once?", id="first", split="train")
    with pytest.raises(UserError) as refused:
        read(good, row)
    assert str(refused.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 2: {reason}")


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_label_written_as_a_float_is_refused_or_understood(read, label):
    try:
        rows = read(labelled(warmer=label, split="train"))
    except UserError as refused:
        assert "line 1: warmer is" in str(refused)
    else:
        assert pairs_of(rows, "warm", WARM, 0.0, 0)[0]["chosen"] == ["yes", "no"][int(label)]


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
        ({"text": "x"}, "line 3: prompt must be"),
        ({"prompt": "x", "split": "dev"}, "line 3: split is 'dev'"),
    ],
)
def test_faulty_prompts_are_named_by_line(read, row, reason):
    with pytest.raises(UserError, match=reason):
        read({"prompt": "Why?"}, {"prompt": "How?"}, row, reader=read_prompts)


@QUICK
@given(prompts=st.lists(TEXTS.filter(str.strip), min_size=2, max_size=8, unique=True), data=st.data())
def test_splits_are_stable_and_shared_by_all_rows_of_a_prompt(tmp_path_factory, prompts, data):
    def splits(rows):
        path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found = read_rows(
            Data(path=str(path), sampler="", prompts=str(path), validation_fraction=0.3, test_fraction=0.3), BOTH, 0
        )
        return {(row["prompt"], row["split"]) for row in found}

    few = [labelled(prompt) for prompt in prompts[:-1]]
    more = data.draw(st.permutations([*few, *few, labelled(prompts[-1])]))
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
        row["id"]: [(" ".join(dice.choices(words, k=dice.randint(1, 30))), n < 3) for n in range(4)] for row in prompts
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
    texts = ["one two three four", "one two three four five", " ".join(["word"] * 20), "", "one two three four"]
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


def test_limited_keeps_all_rows_of_the_first_prompts_of_each_split():
    rows = [
        {"prompt": prompt, "split": SPLITS["abc".index(prompt[0])]}
        for prompt in ("a1", "a2", "b1", "a3", "a1", "c1", "b1", "a2", "a3")
    ]
    assert [row["prompt"] for row in limited(rows, 2)] == ["a1", "a2", "b1", "a1", "c1", "b1", "a2"]
    assert [row["prompt"] for row in limited(rows, 1)] == ["a1", "b1", "a1", "c1", "b1"]
    assert limited(rows, None) == rows


def test_the_data_card_counts_rows_prompts_pairs_and_ties():
    rows = [labelled(id=str(n), split="train", warmer=label) for n, label in enumerate((1, None, 0))]
    card = preferences.data_card(rows, {"warm": pairs_of(rows, "warm", WARM, 0.0, 0)})
    assert (card["rows"], card["prompts"]) == ({"train": 3}, {"train": 1})
    assert card["objectives"]["warm"] == {"pairs": {"train": 2}, "ties": 1, "longer_preferred": 0.5}


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
    assert unseen_prompts(data, rows) == ["How?"]
    file = tmp_path / "more.jsonl"
    other = dataclasses.replace(data, prompts=str(file))
    file.write_text('{"prompt": "Who?"}\n{"prompt": "How?"}\n')
    assert unseen_prompts(other, rows) == ["Who?", "How?"]
    file.write_text('{"prompt": "Who?"}\n{"prompt": "Why?"}\n')
    with pytest.raises(UserError, match=r"more\.jsonl, line 2: the ARMs have seen this prompt in data\.jsonl"):
        unseen_prompts(other, rows)
    file.write_text('{"prompt": "Who?"}\n{"prompt": "Who?"}\n')
    with pytest.raises(UserError, match=r"more\.jsonl, line 2: the prompt is there already"):
        unseen_prompts(other, rows)


def test_the_prompts_of_the_ladder_are_unknown_to_the_embedded_data():
    embedded = Data(path=str(EVERYDAY), sampler="", prompts=str(EVERYDAY.with_name("unseen.jsonl")))
    assert len(unseen_prompts(embedded, read_prompts(embedded, 0))) == 200
