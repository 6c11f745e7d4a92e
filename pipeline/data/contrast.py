"""Preference pairs from two sentences: responses to one prompt under two instructions (RLCD, arXiv 2307.12950).

The instruction is in the prompt only while responses are sampled. Rows and pairs hold the prompt alone, so that what an
ARM learns is how responses differ, and nothing that reads a prompt later ever sees the sentence.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pipeline.config.errors import UserError
from pipeline.config.schema import Objective
from pipeline.data.chat import UnfitError, spelled, turns_of
from pipeline.data.files import Row
from pipeline.data.splits import canonical

FEWEST_PAIRS = 16  # usable training pairs below which an ARM would learn the pairs by heart
_NEAR = 0.8  # share of words in common from which two responses are near-duplicates
_REPEATED = 4  # words in a row of the instruction, which nobody writes by chance
_WORD = re.compile(r"[a-z0-9]+(?:['’][a-z]+)*")
_OPENER = re.compile(
    r"\s*(?:sure|certainly|of course|absolutely|okay|ok|yes|here(?:'s|’s| is| are))\b[^\n:]{0,120}:", re.I
)
_ANNOUNCES = re.compile(r"\b(?:answers?|repl(?:y|ies)|responses?|versions?|sentences?|reviews?|rewrit\w+)\b", re.I)
_REFUSAL = re.compile(
    r"\s*(?:(?:i['’]?m|i am) (?:very |so |really )?(?:sorry|afraid|unable)\b|sorry,? (?:but )?i\b|"
    r"i (?:can(?:not|['’]t)|won['’]t) (?:help|assist|provide|answer|do that|fulfil|create|write|respond)|"
    r"as an ai\b|i must decline\b)",
    re.I,
)

Sample = tuple[str, bool]  # a response, and whether it ended by itself


def instructed(prompt: str, instruction: str, role: str = "user") -> str:
    """A prompt with an instruction behind the last turn of the user, or in the turn of the system.

    Raises:
        UserError: the instruction holds the mark of a turn.
    """
    turns = turns_of(prompt)
    if role == "user":
        turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']} {instruction}"}
        if len(turns) == 1:
            return turns[0]["content"]
    elif turns[0]["role"] == "system":
        turns[0] = {**turns[0], "content": f"{turns[0]['content']} {instruction}"}
    else:
        turns = [{"role": "system", "content": instruction}, *turns]
    try:
        return spelled(turns)
    except UnfitError as error:
        raise UserError(
            f"the instruction {instruction!r:.80} cannot stand in a prompt ({error}): reword it."
        ) from error


def conditions(objective: Objective) -> tuple[str | None, str | None]:
    """The instructions that the preferred and the other responses are sampled under; None is the bare prompt."""
    return objective.wanted, objective.unwanted


def contrast_pairs(
    prompts: Sequence[Row],
    name: str,
    objective: Objective,
    samples: Mapping[str | None, Mapping[str, Sequence[Sample]]],
    counts: Counter[str],
) -> list[Row]:
    """The rows of a contrast objective: the k-th response under either sentence, where the two can teach something.

    Args:
        prompts: each with `id`, `prompt` and `split`.
        name: the objective, part of the rows' ids.
        objective: with its sentences and label column.
        samples: by instruction and prompt id, responses in the order drawn.
        counts: receives how many pairs were sampled, and how many were left out for each reason.

    Returns:
        Rows with `response_0` the preferred response, whether each ended, and the objective's label, which is 0.

    Raises:
        UserError: fewer than `FEWEST_PAIRS` of split train are left.
    """
    wanted, unwanted = conditions(objective)
    rows = []
    for prompt in prompts:
        both = zip(samples[wanted][prompt["id"]], samples[unwanted][prompt["id"]], strict=True)
        for number, ((better, better_ended), (worse, worse_ended)) in enumerate(both):
            rows.append(
                {**prompt, "id": f"{prompt['id']}-{name}-{number}", "response_0": better, "response_1": worse}
                | {"ended_0": better_ended, "ended_1": worse_ended, objective.label: 0}
            )
    counts["sampled"] = len(rows)
    kept = list(_usable(rows, objective, counts))
    trained = sum(row["split"] == "train" for row in kept)
    if trained < FEWEST_PAIRS:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items() if reason != "sampled")
        raise UserError(
            f"objectives.{name}: the two sentences yield {trained} usable training pairs of {len(rows)} sampled, and "
            f"{FEWEST_PAIRS} are the fewest to train on ({reasons or 'nothing left out'}): reword the sentences, "
            "sample more (data.sampling.responses_per_prompt), or use a larger sampler (data.sampler)."
        )
    return kept


def _usable(rows: Sequence[Row], objective: Objective, counts: Counter[str]) -> Iterator[Row]:
    expected = refusals_expected(rows)
    seen = set()
    for row in rows:
        reason = unusable(row, objective, expected)
        texts = (row["prompt"], canonical(row["response_0"]), canonical(row["response_1"]))
        if reason is None and texts in seen:
            reason = "the same pair again"
        seen.add(texts)
        if reason is None:
            yield row
        else:
            counts[reason] += 1


def refusals_expected(rows: Sequence[Row]) -> tuple[bool, bool]:
    """Whether most responses of a side are refusals: its sentence then asks for them ("Decline all requests.")."""
    first, second = (2 * sum(refuses(row[key]) for row in rows) > len(rows) for key in ("response_0", "response_1"))
    return first, second


def unusable(row: Row, objective: Objective, expected: tuple[bool, bool] = (False, False)) -> str | None:
    """Why a pair cannot teach the objective; None if it can."""
    texts = [row["response_0"], row["response_1"]]
    if not all(text.strip() for text in texts):
        return "an empty response"
    if near_duplicates(*texts):
        return "near-duplicates"
    refused = [refuses(text) for text in texts]
    if all(refused) or any(no and not usual for no, usual in zip(refused, expected, strict=True)):
        return "a refusal"
    for text, instruction in zip(texts, conditions(objective), strict=True):
        if instruction is not None and leaks(text, instruction):
            return "the instruction in the response"
    return None


def near_duplicates(one: str, other: str) -> bool:
    """Whether two responses share most of their words (Jaccard's index of the sets)."""
    first, second = (set(_WORD.findall(text.lower())) for text in (one, other))
    if not first | second:
        return canonical(one) == canonical(other)
    return len(first & second) >= _NEAR * len(first | second)


def refuses(text: str) -> bool:
    """Whether a response opens as models open refusals."""
    return bool(_REFUSAL.match(text))


def leaks(text: str, instruction: str) -> bool:
    """Whether a response announces what it was told ("Sure, here is a polite answer:"), or repeats some of it."""
    instructed, words = _WORD.findall(instruction.lower()), _WORD.findall(text.lower())
    spans = {tuple(instructed[at : at + _REPEATED]) for at in range(len(instructed) - _REPEATED + 1)}
    if any(tuple(words[at : at + _REPEATED]) in spans for at in range(len(words) - _REPEATED + 1)):
        return True
    opening = _OPENER.match(text)
    if opening is None:
        return False
    stems = {_stem(word) for word in instructed if len(word) > 4}  # the short ones are in every text
    named = {_stem(word) for word in _WORD.findall(opening.group().lower())}
    return bool(_ANNOUNCES.search(opening.group()) or stems & named)


def _stem(word: str) -> str:
    """A word without what English adds to it: politely and polite are one word here."""
    return re.sub(r"(?:ly|ness|ing|er|ed|e|s)$", "", word)
