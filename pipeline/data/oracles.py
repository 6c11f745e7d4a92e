"""Oracle scorers: exact, offline reward functions from text to a number, higher is better.

Some label data or judge generated text (`objectives.<name>.scorer`); others measure the same thing by other means, and
nothing is trained or chosen on them (`objectives.<name>.held_out_scorer`). The ARMs see neither.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from pipeline.config.errors import UserError

_WORD = re.compile(r"[A-Za-z0-9]+(?:['’][A-Za-z0-9]+)*")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]*]*(?=\s|$)")
CONCISENESS_LIMIT = 40  # words at which a reply stops being concise at all
_FIRST_PERSON = re.compile(r"\b(?:i|me|my|mine|myself|we|us|our|ours|ourselves)\b", re.I)
FEWEST_WORDS = 3  # distinct ones that make a sentence
SIMPLICITY_LIMIT = 10.0  # mean letters per word at which a text stops being simple at all


@cache
def _text_blob() -> Callable[[str], Any]:
    from textblob import TextBlob  # a second to import, and few runs need it

    return TextBlob


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def positivity(text: str) -> float:
    """VADER's compound sentiment (Hutto & Gilbert 2014), in [-1, 1]; 0 is neutral."""
    return float(_vader().polarity_scores(text)["compound"])


def polarity(text: str) -> float:
    """TextBlob's sentiment, in [-1, 1]: a mean over words of Pattern's lexicon (De Smedt & Daelemans 2012)."""
    return float(_text_blob()(text).sentiment.polarity)


def is_whole(text: str) -> bool:
    """Whether a reply ends where a sentence ends and has `FEWEST_WORDS` distinct words: neither cut off nor a cry."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text.rstrip())]
    return bool(ends) and ends[-1] == len(text.rstrip()) and len(set(_words(text))) >= FEWEST_WORDS


def conciseness(text: str) -> float:
    """A whole reply in few words: 1 minus words over `CONCISENESS_LIMIT`, in [0, 1]; 0 for one that is not whole."""
    return 1.0 - min(len(_words(text)), CONCISENESS_LIMIT) / CONCISENESS_LIMIT if is_whole(text) else 0.0


def few_sentences(text: str) -> float:
    """1 over the number of sentences of a whole reply; 0 for one that is not whole."""
    return 1.0 / len(_SENTENCE_END.findall(text)) if is_whole(text) else 0.0


def simplicity(text: str) -> float:
    """Short words: 1 minus the mean letters per word over `SIMPLICITY_LIMIT`, in [0, 1]; 0 without words."""
    words = _WORD.findall(text)
    if not words:
        return 0.0
    return max(0.0, 1.0 - sum(map(len, words)) / len(words) / SIMPLICITY_LIMIT)


def first_person(text: str) -> float:
    """The share of a text's sentences that speak in the first person (I, my, we, …), in [0, 1]; 0 without sentences."""
    sentences = [part for part in _SENTENCE_END.split(text) if _WORD.search(part)]
    return sum(bool(_FIRST_PERSON.search(part)) for part in sentences) / len(sentences) if sentences else 0.0


def subjectivity(text: str) -> float:
    """TextBlob's subjectivity, in [0, 1]: a mean over words of Pattern's lexicon (De Smedt & Daelemans 2012)."""
    return float(_text_blob()(text).sentiment.subjectivity)


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


SCORERS: dict[str, Callable[[str], float]] = {
    "positivity": positivity,
    "polarity": polarity,
    "conciseness": conciseness,
    "few_sentences": few_sentences,
    "simplicity": simplicity,
    "first_person": first_person,
    "subjectivity": subjectivity,
}


def scorer(name: str) -> Callable[[str], float]:
    """The oracle scorer of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SCORERS:
        raise UserError(f"objectives: there is no scorer {name}: choose one of {', '.join(SCORERS)}.")
    return SCORERS[name]
