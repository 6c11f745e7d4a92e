import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.errors import UserError
from pipeline.data.oracles import (
    CONCISENESS_LIMIT,
    SCORERS,
    conciseness,
    few_sentences,
    first_person,
    polarity,
    positivity,
    scorer,
    simplicity,
    subjectivity,
)

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
WORDS = st.lists(st.text("abcdefghij", min_size=1, max_size=12), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("name", "low"),
    [
        ("positivity", -1.0),
        ("polarity", -1.0),
        ("conciseness", 0.0),
        ("few_sentences", 0.0),
        ("simplicity", 0.0),
        ("first_person", 0.0),
        ("subjectivity", 0.0),
    ],
)
@QUICK
@given(text=st.text(max_size=300))
def test_scores_stay_in_range_and_are_repeatable(name, low, text):
    score = scorer(name)(text)
    assert low <= score <= 1.0
    assert scorer(name)(text) == score


def test_every_scorer_is_found_by_its_name():
    assert {name: scorer(name) for name in SCORERS} == SCORERS


def test_an_unknown_scorer_is_refused_with_the_known_ones():
    with pytest.raises(
        UserError, match="there is no scorer humour: choose one of positivity, polarity, conciseness, few_sentences"
    ):
        scorer("humour")


def test_positivity_knows_warm_neutral_and_cold():
    assert positivity("I love this wonderful tea!") > 0.5
    assert positivity("The table has four legs.") == 0.0
    assert positivity("This is a terrible, awful day.") < -0.5
    assert positivity("It is not good.") < 0 < positivity("It is good.")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0.0),
        ("... !?", 0.0),
        ("Awwww!", 0.0),
        ("Yes! Yes! Yes!", 0.0),  # one word, three times
        ("A cup of tea and", 0.0),  # cut off
        ("A cup of tea", 0.0),
        ("A cup of tea.", 0.9),
        ('He said: "Don’t do that."', 0.875),
        ("Is it 3 o'clock?  ", 0.9),
        ("A well-made tea… (hot!)", 0.875),
        ("word " * CONCISENESS_LIMIT + "is here.", 0.0),
    ],
)
def test_conciseness_counts_the_words_of_a_whole_reply(text, score):
    assert conciseness(text) == pytest.approx(score)


@QUICK
@given(words=WORDS)
def test_another_word_never_makes_a_whole_reply_more_concise(words):
    longer, shorter = (conciseness(" ".join(["there", "it", "is", *each]) + ".") for each in ([*words, "more"], words))
    assert longer < shorter or longer == shorter == 0.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0.0),
        ("Tea is", 0.0),
        ("Tea is good.", 1.0),
        ("Tea is good. So is 3.5 of it!", 0.5),
        ("Why not? Tea is good...", 0.5),
    ],
)
def test_few_sentences_counts_the_sentences_of_a_whole_reply(text, score):
    assert few_sentences(text) == pytest.approx(score)


def test_polarity_agrees_with_positivity_in_sign_on_plain_cases():
    assert polarity("I love this wonderful tea!") > 0 == polarity("The table has four legs.")
    assert polarity("This is a terrible, awful day.") < 0


@pytest.mark.parametrize(
    ("text", "score"),
    [("", 0.0), ("?!", 0.0), ("a", 0.9), ("abcde", 0.5), ("a abc", 0.8), ("abcdefghij", 0.0), ("a" * 30, 0.0)],
)
def test_simplicity_is_the_mean_length_of_words(text, score):
    assert simplicity(text) == pytest.approx(score)


@QUICK
@given(words=WORDS)
def test_simplicity_does_not_depend_on_how_many_words_there_are(words):
    assert simplicity(" ".join(words * 3)) == pytest.approx(simplicity(" ".join(words)))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0.0),
        ("?!", 0.0),
        ("I like tea.", 1.0),
        ("Tea is good. We drink it", 0.5),
        ("Minus is it. Mine! 3.5 of US, island I’ve seen?", 2 / 3),
        ("Tea is good. It is hot. It is mine", 1 / 3),
    ],
)
def test_first_person_is_the_share_of_sentences_that_speak_so(text, score):
    assert first_person(text) == pytest.approx(score)


@QUICK
@given(words=WORDS)
def test_first_person_does_not_depend_on_how_long_the_sentences_are(words):
    assert first_person(f"It {' '.join('x' + word for word in words)}. I do.") == pytest.approx(0.5)


def test_subjectivity_tells_opinions_from_facts():
    assert subjectivity("I love this wonderful tea!") > 0.5 > subjectivity("The table has four legs.")
