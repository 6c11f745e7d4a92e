import numpy as np
import pandas as pd
import pytest

from pipeline.config.schema import Objective
from pipeline.evaluation.statistics import Bootstrap
from pipeline.evaluation.text_quality import (
    HIGHEST_PERPLEXITY,
    distinct_2,
    distinct_bigrams,
    quality_columns,
    readable,
    readable_scores,
    reads_well,
    relevance,
    repetition,
)

SURE = Bootstrap(0.95, 100, 0)
WARM = Objective(label="x", scorer="positivity", held_out_scorer="polarity", reference=-0.5)


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        ([], 0.0),
        (["", "word"], 0.0),
        (["a b c"], 1.0),
        (["a a a a"], 1 / 3),
        (["The tea", "the TEA"], 0.5),
        (["a b", "c d"], 1.0),
    ],
)
def test_distinct_2_is_the_share_of_different_bigrams_within_texts(texts, share):
    assert distinct_2(texts) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("The bus ride was a wonderful experience, and I'm happy to have been a part of it.", True),
        ("It's a lovely day!", True),
        ("", False),
        ("Awesome!", False),  # one word
        ("Awwww, that is so sweet of you.", False),  # a letter drawn out
        ("Yes yes yes yes yes yes yes yes", False),
        ("I am so glad. I am so glad. I am so glad. I am so glad.", False),
        ("So so very so so good so so it so is", False),  # its commonest word is most of it
        ("Call 555 0000 or see www.example.org, will you?", True),
    ],
)
def test_what_reads_well_is_neither_a_cry_nor_a_repetition(text, reads):
    assert reads_well(text) is reads


def test_repetition_and_bigrams_of_one_text():
    assert (repetition(""), repetition("tea"), repetition("Tea tea cup")) == (0.0, 1.0, pytest.approx(2 / 3))
    assert (distinct_bigrams(""), distinct_bigrams("tea"), distinct_bigrams("a a a")) == (1.0, 1.0, 0.5)


def rows(*texts, perplexity=10.0, tokens=5, **columns):
    frame = pd.DataFrame({"prompt": [f"p{place}" for place in range(len(texts))], "response": texts})
    return frame.assign(finish="eos", n_tokens=tokens, logp_base=-tokens * np.log(perplexity), **columns)


def test_a_response_that_the_base_finds_absurd_is_not_readable():
    assert readable(rows("It is a day.", perplexity=HIGHEST_PERPLEXITY - 1)).all()
    assert not readable(rows("It is a day.", perplexity=HIGHEST_PERPLEXITY + 1)).any()


def test_an_unreadable_response_scores_at_the_reference_and_never_gains_by_it():
    frame = rows("It is a day.", "Awwww!", "Nooooo!", "Hmmmm!", warm=[0.9, 0.9, -0.8, None])
    scores = readable_scores(frame, {"warm": WARM}).warm.tolist()
    assert scores[:3] == [0.9, -0.5, -0.8] and np.isnan(scores[3]), "below the reference it stays, as does no verdict"


def test_the_columns_say_what_the_texts_are():
    frame = rows("It is a lovely day.", "It is a day", "Nooooo", warm=0.5)
    frame.loc[1, "finish"] = "length"
    columns = quality_columns(frame, {"warm": WARM}, SURE)
    assert columns["readable"] == columns["ended"] == pytest.approx(2 / 3)
    assert columns["words"] == pytest.approx(10 / 3) and columns["perplexity"] == pytest.approx(10)
    assert columns["relevance"] == columns["relevance_ci_low"] == columns["relevance_ci_high"] == 0.5, "no word of any"
    assert columns["readable_warm"] == pytest.approx((0.5 + 0.5 - 0.5) / 3)
    assert columns["held_out_warm"] == pytest.approx(0.5 / 3), "by TextBlob: lovely is 0.5, and the others are nothing"


def test_relevance_tells_a_responses_own_prompt_from_the_others():
    prompts = ["Write about the kitten.", "Write about green tea.", "How do I arrange a bookshelf?"]
    apt = ["My kitten sleeps.", "Drink green tea green.", "Arranging bookshelves is easy."]
    assert relevance(prompts, apt).tolist() == [1.0, 1.0, 1.0]
    assert relevance(prompts, ["Wonderful!", "", "So glad!"]).tolist() == [0.5, 0.5, 0.5]
    assert relevance(prompts, [apt[1], apt[2], apt[0]]).tolist() == [0.25] * 3, "below one, level with the other"
    assert relevance(prompts * 2, apt + apt).tolist() == [1.0] * 6, "more samples add no prompts"
    assert relevance(prompts[:1], apt[:1]).tolist() == [0.0], "there is no other prompt"
