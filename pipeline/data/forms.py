"""The forms that a row of a dataset may have, and what it says in each: prompt, two responses, labels.

A row says by its fields which form is its own:

* `response_0`, `response_1` and a label column for each objective (PKU-SafeRLHF);
* `prompt`, `chosen`, `rejected` (TRL's explicit prompt, HH-RLHF by Dahoas), perhaps with the `objective`;
* `chosen` and `rejected` that begin with the same prompt (TRL's implicit prompt, Anthropic's HH-RLHF);
* `instruction`, `output_1`, `output_2` and `preference` (the `annotations.json` of alpaca_eval), perhaps with the
  `objective`.

Each of the texts may be a list of messages instead (UltraFeedback, TRL's conversational formats), and a `system` text
may stand before the prompt. Numbers may be the texts that CSV has of them.
"""

import re
from collections.abc import Mapping
from math import isnan
from typing import Any

from pipeline.config.errors import UserError
from pipeline.config.schema import Objective
from pipeline.data.chat import Text, UnfitError, divided, exchange, messages_of, prompt_text
from pipeline.data.files import Row
from pipeline.data.splits import RESPONSES

_WRITTEN = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]""")  # as tables have lists, which they cannot hold
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def texts_of(raw: Row, objectives: Mapping[str, Objective], where: str) -> Row:
    """Prompt, responses, labels, and whether the responses ended if the row knows, however it spells them.

    Raises:
        UnfitError: why the row cannot be used.
        UserError: it is malformed; `where` names file and line.
    """
    if "preference" in raw and "output_1" in raw:
        raw = _annotated(raw, objectives, where)
    # A table has every column in every row, so the other form's may be there and null.
    compared = "chosen" in raw and (raw["chosen"] is not None or "response_0" not in raw)
    sides = ("chosen", "rejected") if compared else RESPONSES
    # Messages need no prompt beside them; but where a prompt is null beside texts, none is made of what they share.
    prompt_or_none = None if compared and raw.get("prompt") is None else _text(raw, "prompt", where)
    both, system = [_text(raw, side, where) for side in sides], _system(raw, where)
    if compared and "prompt" not in raw and all(isinstance(text, str) for text in both):
        prompt, *answers = divided(str(both[0]), str(both[1]))
        prompt = prompt_text(prompt, system)
    else:
        (prompt, first), (other, second) = (exchange(prompt_or_none, text, system) for text in both)
        answers = [first, second]
        if prompt != other:
            raise UnfitError("transcripts that part before the last answer")
    row: Row = {"prompt": whole(prompt, "prompt")}
    row |= {key: whole(text, side.partition("_")[0]) for key, side, text in zip(RESPONSES, sides, answers, strict=True)}
    row |= _preferred(raw, objectives, where) if compared else _labels(raw, objectives, where)
    ends = [f"{side}_ended" for side in sides] if compared else ["ended_0", "ended_1"]
    for key, end in zip(("ended_0", "ended_1"), ends, strict=True):
        if raw.get(end) is not None:
            row[key] = _truth(raw[end], end, where)
    return row


def prompt_of(raw: Row, where: str) -> str:
    """The prompt of a row that has nothing else.

    Raises:
        UnfitError: why it cannot be used.
        UserError: the row is malformed.
    """
    return whole(prompt_text(_text(raw, "prompt", where), _system(raw, where)), "prompt")


def _text(row: Row, key: str, where: str) -> Text:
    if key not in row:
        raise UserError(
            f"{where}: no column {key}, only {', '.join(map(str, row))}: set data.columns.{key} to one of them."
        )
    value = row[key]
    messages = messages_of(value)
    if messages is not None:
        return messages
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UnfitError(f"an empty {key.partition('_')[0]}")
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {value!r:.80}: it must be a text or a list of messages.")
    if _WRITTEN.match(value):
        raise UnfitError("a list of messages written as a text")
    return value


def _system(raw: Row, where: str) -> str | None:
    system = raw.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f"{where}: system is {system!r:.80}: it must be a text.")
    return system if system and system.strip() else None


def whole(text: str, name: str) -> str:
    """The text, if it is not blank and a file can hold it.

    Raises:
        UnfitError: it is blank, or has half a character: JSON can say one half of a surrogate pair.
    """
    if not text.strip():
        raise UnfitError(f"an empty {name}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnfitError(f"half a character in the {name}") from error
    return text


def _annotated(raw: Row, objectives: Mapping[str, Objective], where: str) -> Row:
    """An annotation of alpaca_eval as a row with labels: `preference` is 1 for the first output, 2 for the second.

    What lies between them is a weighted vote, 1.5 a draw; 0 and null are a draw and an annotator without a verdict.
    """
    name, value = _objective_of(raw, objectives, where), _number(raw["preference"], "preference", where)
    if value is not None and value != 0 and not 1 <= value <= 2:
        raise UserError(f"{where}: preference is {value:g}: alpaca_eval has 1 to 2, or 0 or null for a draw.")
    label = None if value in (None, 0, 1.5) else int(value > 1.5)
    texts = {"prompt": "instruction", "response_0": "output_1", "response_1": "output_2"}
    row = {ours: raw[theirs] for ours, theirs in texts.items() if theirs in raw}
    return raw | row | {one.label: label if other == name else None for other, one in objectives.items()}


def _objective_of(raw: Row, objectives: Mapping[str, Objective], where: str) -> str:
    """What the preference of a row is about; it need not say so where there is one objective."""
    name = raw.get("objective", next(iter(objectives)) if len(objectives) == 1 else None)
    if not isinstance(name, str) or name not in objectives:
        raise UserError(f"{where}: objective is {name!r}: use one of {', '.join(objectives)}.")
    return name


def _preferred(raw: Row, objectives: Mapping[str, Objective], where: str) -> Row:
    """The labels of a row that says which response is chosen: of one objective."""
    name = _objective_of(raw, objectives, where)
    better, worse = (_number(raw.get(f"score_{side}"), f"score_{side}", where) for side in ("chosen", "rejected"))
    if better is not None and worse is not None and better < worse:
        raise UnfitError("a rejected response with the higher score")
    tied = better is not None and better == worse
    return {objective.label: 0 if other == name and not tied else None for other, objective in objectives.items()}


def _labels(raw: Row, objectives: Mapping[str, Objective], where: str) -> Row:
    labels: Row = {}
    for name, objective in objectives.items():
        if objective.label not in raw:
            raise UserError(
                f"{where}: the objective {name} has no label column {objective.label}: add it, or set "
                f"objectives.{name}.label to one of {', '.join(map(str, raw))}."
            )
        label = _number(raw[objective.label], objective.label, where, "0, 1, or null for a tie")
        if label not in (0, 1, None):
            raise UserError(f"{where}: {objective.label} is {raw[objective.label]!r}: use 0, 1, or null for a tie.")
        labels[objective.label] = None if label is None else int(label)
    return labels


def _number(value: Any, key: str, where: str, wanted: str = "a number or null") -> float | None:
    """CSV has numbers as texts, and Parquet, which knows no null integers, has them as floats and null as NaN."""
    if value is None:
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError("of another kind")
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: {key} is {value!r:.80}: use {wanted}.") from error
    return None if isnan(number) else number


def _truth(value: Any, key: str, where: str) -> bool:
    truth = _TRUTH.get(str(value).lower())
    if truth is None:
        raise UserError(f"{where}: {key} is {value!r:.80}: use true or false.")
    return truth
