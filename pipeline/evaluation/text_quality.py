"""What a response is as a text, whatever it scores: whether one can read it, and whether it answers its prompt.

An objective can be bought with text that nobody wants: one word drawn out, a sentence repeated, letters. These measures
see that, and nothing is trained or chosen on scorers of them. Shapes: N texts.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from pipeline.config.schema import Objective
from pipeline.data.files import digest
from pipeline.data.oracles import scorer
from pipeline.evaluation.statistics import Bootstrap, bootstrap_mean, prompt_means

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_DRAWN_OUT = re.compile(r"([^\W\d_])\1{3}", re.I)  # a letter four times in a row, as no English word has it

OTHER_PROMPTS = 100  # that a response is compared with at most
_ENDING = re.compile(r"(?<=\w{3})(?:ly|ness|ing|er|ed|e|s)$")
_TIE = 1e-9  # between cosines that differ by rounding alone

# A readable response has all of these.
FEWEST_WORDS = 3
LOWEST_DISTINCT_2 = 0.8  # of its word bigrams
HIGHEST_REPETITION = 0.34  # share of its words that are its commonest one, where it has at least `REPETITION_WORDS`
REPETITION_WORDS = 6
HIGHEST_PERPLEXITY = 100.0  # under the base, per token


def repetition(text: str) -> float:
    """The share of a text's words that are its commonest word; 1 for a text of one word, 0 without words."""
    words = _WORD.findall(text.lower())
    return Counter(words).most_common(1)[0][1] / len(words) if words else 0.0


def distinct_bigrams(text: str) -> float:
    """Distinct word bigrams over all of one text (Li et al. 2016); 1 for a text of less than two words."""
    bigrams = list(pairwise(text.lower().split()))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def reads_well(text: str) -> bool:
    """Whether a text has words enough, no drawn-out ones, and does not repeat itself."""
    words = _WORD.findall(text)
    if len(words) < FEWEST_WORDS or _DRAWN_OUT.search(text):
        return False
    if len(words) >= REPETITION_WORDS and repetition(text) > HIGHEST_REPETITION:
        return False
    return distinct_bigrams(text) >= LOWEST_DISTINCT_2


def distinct_2(texts: Iterable[str]) -> float:
    """Distinct word bigrams over all word bigrams of the texts together (Li et al. 2016); 0 without bigrams."""
    count, distinct = 0, set()
    for text in texts:
        bigrams = list(pairwise(text.lower().split()))
        count += len(bigrams)
        distinct.update(bigrams)
    return len(distinct) / count if count else 0.0


def perplexities(rows: pd.DataFrame) -> np.ndarray:
    """Of every response under the base, its end included: exp(−logp_base / tokens), perplexity_N."""
    return np.exp(-rows.logp_base.to_numpy(float) / rows.n_tokens.to_numpy(float).clip(1))


def readable(rows: pd.DataFrame) -> np.ndarray:
    """Which responses one can read: `reads_well`, and not above `HIGHEST_PERPLEXITY` under the base: mask_N.

    Args:
        rows: `response`, `logp_base`, `n_tokens`.
    """
    texts_N = np.fromiter(map(reads_well, rows.response), dtype=bool, count=len(rows))
    return texts_N & (perplexities(rows) <= HIGHEST_PERPLEXITY)


def relevance(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """How well each response tells its own prompt from the others: relevance_N, in [0, 1], by chance 1/2.

    The share of the other prompts that a response is less like than its own, prompts that it is as like counting half.
    Alike is the cosine of words weighed by their rarity among the prompts (TF-IDF, Spärck Jones 1972), endings cut off;
    a dialogue is its last turn's words and all before. A paraphrase that shares no word is not seen.

    Args:
        prompts: of each response. Others are drawn from among them, at most `OTHER_PROMPTS`.
        responses: the texts.
    """
    distinct = sorted(set(prompts), key=lambda prompt: digest(prompt))
    others = distinct[:OTHER_PROMPTS]
    stems = [_stems(prompt) for prompt in distinct]
    known = Counter(stem for each in stems for stem in each)
    rarity = {stem: math.log(len(distinct) / count) for stem, count in known.items()}
    places = {stem: place for place, stem in enumerate(sorted(rarity))}

    def matrix(texts: Iterable[set[str]]) -> csr_array:
        rows = [sorted(places[stem] for stem in each if stem in places) for each in texts]
        weights = np.array([rarity[stem] for stem in sorted(rarity)])
        columns = np.concatenate([*map(np.asarray, rows), []]).astype(int)
        values = csr_array((weights[columns], columns, np.cumsum([0, *map(len, rows)])), (len(rows), len(places)))
        lengths = np.sqrt(values.multiply(values).sum(axis=1))
        return values.multiply(1 / np.where(lengths > 0, lengths, 1)[:, None]).tocsr()

    of_prompt = {prompt: place for place, prompt in enumerate(distinct)}
    prompts_PV = matrix(stems)
    responses_NV = matrix(map(_stems, responses))
    own_N = responses_NV.multiply(prompts_PV[[of_prompt[prompt] for prompt in prompts]]).sum(axis=1)
    like_NO = (responses_NV @ prompts_PV[: len(others)].T).toarray()
    is_other_NO = np.array(prompts)[:, None] != np.array(others)[None, :]
    beaten_NO = (own_N[:, None] > like_NO + _TIE) + 0.5 * (np.abs(own_N[:, None] - like_NO) <= _TIE)
    return np.where(is_other_NO, beaten_NO, 0.0).sum(axis=1) / np.maximum(is_other_NO.sum(axis=1), 1)


def _stems(text: str) -> set[str]:
    """The words of a text without what English adds to them: arrange, arranging and arranged are one here."""
    return {_ENDING.sub("", word) for word in _WORD.findall(text.lower())}


def readable_scores(rows: pd.DataFrame, objectives: Mapping[str, Objective]) -> pd.DataFrame:
    """The scores with those of unreadable responses at the objective's reference point, where they add no volume.

    A score below the reference point stays; one that is undetermined does too.
    """
    reads_N = readable(rows)
    return pd.DataFrame(
        {
            name: rows[name].where(reads_N | ~(rows[name] > objective.reference), objective.reference)
            for name, objective in objectives.items()
        }
    )


def quality_columns(rows: pd.DataFrame, objectives: Mapping[str, Objective], bootstrap: Bootstrap) -> dict[str, float]:
    """The columns of a table that say what the texts of one of its lines are.

    `readable` and `ended` are shares of the responses; `perplexity` is per token of all of them, `distinct_2` of all
    of them, `distinct_2_within` and `repetition` means over them; `relevance` is the mean over prompts of the function
    of that name, `held_out_<objective>` that of the scorer on which nothing was trained or chosen, both with
    intervals that resample prompts; `readable_<objective>` is the mean of `readable_scores`.

    Args:
        rows: those of the line: `prompt`, `response`, `finish`, `logp_base`, `n_tokens`, a score for each objective.
        objectives: of the run.
        bootstrap: of the intervals.
    """

    def with_interval(name: str, values: pd.Series) -> dict[str, float]:
        means = prompt_means(pd.DataFrame({"prompt": rows.prompt, name: values}), name)
        mean, low, high = bootstrap_mean(means, bootstrap)
        return {name: mean, f"{name}_ci_low": low, f"{name}_ci_high": high}

    columns = {
        "readable": float(readable(rows).mean()),
        "ended": float((rows.finish != "length").mean()),
        "words": float(rows.response.map(lambda text: len(text.split())).mean()),
        "perplexity": float(np.exp(-rows.logp_base.sum() / rows.n_tokens.sum())),
        "distinct_2": distinct_2(rows.response),
        "distinct_2_within": float(rows.response.map(distinct_bigrams).mean()),
        "repetition": float(rows.response.map(repetition).mean()),
    }
    columns |= with_interval("relevance", pd.Series(relevance(list(rows.prompt), list(rows.response)), rows.index))
    scores = readable_scores(rows, objectives).assign(prompt=rows.prompt)
    for name, objective in objectives.items():
        means_P = prompt_means(scores, name)
        columns[f"readable_{name}"] = float(means_P.mean()) if len(means_P) else math.nan
        if objective.held_out_scorer is not None:
            columns |= with_interval(f"held_out_{name}", rows.response.map(scorer(objective.held_out_scorer)))
    return columns
