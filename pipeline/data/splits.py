"""Preference data: read from files, checked, split by prompt, labelled and paired.

A row holds `id`, `prompt`, `split`, `response_0`, `response_1` and for each objective a label: which of the two it
prefers (0, 1, or None for a tie). A pair is what one objective makes of a row: `chosen` and `rejected`. A prompt is
text: a question, or a dialogue as `dialogues` spells it.
"""

from functools import lru_cache
from typing import Any
from unicodedata import normalize

from pipeline.config.schema import Data
from pipeline.data.files import digest

SPLITS = ("train", "validation", "test")
RESPONSES = ("response_0", "response_1")


def uniform_of(*key: Any) -> float:
    """A uniform in [0, 1) that is a function of the key alone: stable when rows are added or reordered."""
    return int(digest(list(key))[:13], 16) / 16**13


@lru_cache(maxsize=16)  # several questions are asked about each prompt as its row passes
def canonical(text: str) -> str:
    """What is the same text to a reader: spaces and line ends alike, and Unicode's ways to write a letter."""
    return " ".join(normalize("NFKC", text).split())


def split_of(prompt: str, data: Data, seed: int) -> str:
    """The split of a prompt that names none; every row of a prompt, however it is spaced, falls into the same one."""
    place = uniform_of("split", seed, canonical(prompt))
    if place < data.test_fraction:
        return "test"
    return "validation" if place < data.test_fraction + data.validation_fraction else "train"
