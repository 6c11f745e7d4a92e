"""Oracle scorers: exact, offline reward functions from text to a number, higher is better.

They label the embedded preference data and judge the generated text; the ARMs never see them.
"""

import re
from collections.abc import Callable
from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from pipeline.config.errors import UserError

_WORD = re.compile(r"[A-Za-z0-9]+(?:['’][A-Za-z0-9]+)*")
CONCISENESS_LIMIT = 40  # words at which a reply stops being concise at all
SIMPLICITY_LIMIT = 10.0  # mean letters per word at which a text stops being simple at all


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def positivity(text: str) -> float:
    """VADER's compound sentiment (Hutto & Gilbert 2014), in [-1, 1]; 0 is neutral."""
    return float(_vader().polarity_scores(text)["compound"])


def conciseness(text: str) -> float:
    """1 for an empty reply, falling linearly to 0 at `CONCISENESS_LIMIT` words and staying there."""
    return 1.0 - min(len(_WORD.findall(text)), CONCISENESS_LIMIT) / CONCISENESS_LIMIT


def simplicity(text: str) -> float:
    """Short words: 1 minus the mean letters per word over `SIMPLICITY_LIMIT`, in [0, 1]; 0 without words."""
    words = _WORD.findall(text)
    if not words:
        return 0.0
    return max(0.0, 1.0 - sum(map(len, words)) / len(words) / SIMPLICITY_LIMIT)


SCORERS: dict[str, Callable[[str], float]] = {
    "positivity": positivity,
    "conciseness": conciseness,
    "simplicity": simplicity,
}


def scorer(name: str) -> Callable[[str], float]:
    """The oracle scorer of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SCORERS:
        raise UserError(f"objectives: there is no scorer {name}: choose one of {', '.join(SCORERS)}.")
    return SCORERS[name]
