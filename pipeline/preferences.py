"""Preference data: prompts and rows read and validated, labelled, split and paired."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.config import Data, Objective, UserError
from pipeline.scorers import scorer
from pipeline.store import Row, digest, read_jsonl

SPLITS = ("train", "validation", "test")
RESPONSES = ("response_0", "response_1")


def uniform_of(*key: Any) -> float:
    """A uniform in [0, 1) that is a function of the key alone: stable when rows are added or reordered."""
    return int(digest(list(key))[:13], 16) / 16**13


def split_of(prompt: str, data: Data, seed: int) -> str:
    """The split of a prompt that names none; every row of a prompt falls into the same one."""
    place = uniform_of("split", seed, prompt)
    if place < data.test_fraction:
        return "test"
    return "validation" if place < data.test_fraction + data.validation_fraction else "train"


def _text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} must be a non-empty text: correct or remove the line.")
    return value


def _split(row: Row, where: str, data: Data, seed: int) -> str:
    split = row.get("split")
    if split is None:
        return split_of(row["prompt"], data, seed)
    if split not in SPLITS:
        raise UserError(f"{where}: split is {split!r}: use one of {', '.join(SPLITS)}, or leave it out.")
    return str(split)


def read_prompts(data: Data, seed: int) -> list[Row]:
    """Prompts of a JSON Lines file: `id`, `prompt`, `split`.

    Raises:
        UserError: a malformed line, a missing or repeated prompt (file and line are named).
    """
    path, seen, prompts = Path(data.path), dict[str, int](), list[Row]()
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        prompt = _text(row, "prompt", where)
        if prompt in seen:
            raise UserError(f"{where}: the prompt of line {seen[prompt]} again: remove one of them.")
        seen[prompt] = number
        prompts.append({"id": digest(prompt)[:12], "prompt": prompt, "split": _split(row, where, data, seed)})
    return limited(prompts, data.limit)


def read_rows(data: Data, objectives: Mapping[str, Objective], seed: int) -> list[Row]:
    """Preference rows of a JSON Lines file: `id`, `prompt`, `split`, two responses and one label per objective.

    A line holds either `response_0`, `response_1` and every objective's label column (0, 1, or null for a tie), or
    `chosen`, `rejected` and the `objective` that they are for (which may be left out where there is only one).

    Raises:
        UserError: a malformed line, equal responses, a repeated id, a missing label (file and line are named).
    """
    path, seen, rows = Path(data.path), dict[str, int](), list[Row]()
    splits: dict[str, tuple[str, int]] = {}
    for number, raw in read_jsonl(path):
        where = f"{path}, line {number}"
        row: Row = {"id": str(raw.get("id", number)), "prompt": _text(raw, "prompt", where)}
        if row["id"] in seen:
            raise UserError(f"{where}: the id {row['id']} of line {seen[row['id']]} again: make ids unique.")
        seen[row["id"]] = number
        row["split"] = _split(raw, where, data, seed)
        first_split, first_line = splits.setdefault(row["prompt"], (row["split"], number))
        if first_split != row["split"]:
            raise UserError(
                f"{where}: its prompt is in split {first_split} at line {first_line} and in {row['split']} here: "
                "keep all rows of a prompt in one split."
            )
        row |= _chosen_rejected(raw, objectives, where) if "chosen" in raw else _labelled(raw, objectives, where)
        if row["response_0"].strip() == row["response_1"].strip():
            raise UserError(f"{where}: the two responses are equal, so neither is preferred: remove the line.")
        rows.append(row)
    return limited(rows, data.limit)


def _labelled(raw: Row, objectives: Mapping[str, Objective], where: str) -> Row:
    row = {key: _text(raw, key, where) for key in RESPONSES}
    for name, objective in objectives.items():
        if objective.label not in raw:
            raise UserError(
                f"{where}: the objective {name} has no label column {objective.label}: add it, or set "
                f"objectives.{name}.label to one of {', '.join(map(str, raw))}."
            )
        label = raw[objective.label]
        if label not in (0, 1, None) or isinstance(label, bool | float):
            raise UserError(f"{where}: {objective.label} is {label!r}: use 0, 1, or null for a tie.")
        row[objective.label] = label
    return row


def _chosen_rejected(raw: Row, objectives: Mapping[str, Objective], where: str) -> Row:
    name = raw.get("objective", next(iter(objectives)) if len(objectives) == 1 else None)
    if not isinstance(name, str) or name not in objectives:
        raise UserError(f"{where}: objective is {name!r}: use one of {', '.join(objectives)}.")
    labels = {objective.label: 0 if other == name else None for other, objective in objectives.items()}
    return {"response_0": _text(raw, "chosen", where), "response_1": _text(raw, "rejected", where), **labels}


def unseen_prompts(data: Data, rows: Sequence[Row]) -> list[str]:
    """The prompts to generate from: those of split test, or those of the file `data.prompts`.

    Raises:
        UserError: a malformed line, or a prompt that the ARMs are trained or chosen on.
    """
    if data.prompts == data.path:
        return list(dict.fromkeys(row["prompt"] for row in rows if row["split"] == "test"))
    seen, found = {row["prompt"] for row in rows if row["split"] != "test"}, dict[str, None]()
    for number, row in read_jsonl(Path(data.prompts)):
        where = f"{data.prompts}, line {number}"
        prompt = _text(row, "prompt", where)
        if prompt in found:
            raise UserError(f"{where}: the prompt is there already: remove one of them.")
        if prompt in seen:
            raise UserError(f"{where}: the ARMs have seen this prompt in {data.path}: remove it from one of them.")
        found[prompt] = None
    return list(found)[: data.limit]


def limited(rows: list[Row], limit: int | None) -> list[Row]:
    """The rows of the first `limit` prompts of each split (all where it is None)."""
    if limit is None:
        return rows
    kept: dict[str, dict[str, None]] = {split: {} for split in SPLITS}
    for row in rows:
        if len(kept[row["split"]]) < limit:
            kept[row["split"]].setdefault(row["prompt"])
    return [row for row in rows if row["prompt"] in kept[row["split"]]]


def label_samples(
    prompts: Sequence[Row], samples: Mapping[str, Sequence[tuple[str, bool]]], objectives: Mapping[str, Objective]
) -> Iterator[Row]:
    """Every two distinct responses of a prompt as a row, each objective's oracle preferring one.

    Which rows there are does not depend on the objectives, so a further one leaves the others' pairs alone. Scores
    closer than `objective.tie` make a null label, as an annotator would shrug.

    Args:
        samples: by prompt id, each response and whether it ended by itself rather than at the length limit; `ended_0`
            and `ended_1` keep that, since only a response that ended has an end-of-sequence token to learn from.
    """
    for prompt in prompts:
        ended = {text: end for text, end in samples[prompt["id"]] if text}
        distinct = list(ended)
        scores = {
            objective.label: [scorer(str(objective.scorer))(text) for text in distinct]
            for objective in objectives.values()
        }
        ties = {objective.label: objective.tie for objective in objectives.values()}
        for first, second in combinations(range(len(distinct)), 2):
            row = {**prompt, "id": f"{prompt['id']}-{first}{second}"}
            row |= {"response_0": distinct[first], "response_1": distinct[second]}
            row |= {"ended_0": ended[distinct[first]], "ended_1": ended[distinct[second]]}
            for label, score in scores.items():
                difference = score[second] - score[first]
                close = difference == 0 or abs(difference) < ties[label]
                row[label] = None if close else int(difference > 0)
            yield row


def pairs_of(rows: Sequence[Row], name: str, objective: Objective, noise: float, seed: int) -> list[Row]:
    """The rows an objective has an opinion on: `id`, `prompt`, `split`, `chosen`, `rejected`, and whether they ended.

    A share `noise` of the training and validation labels is flipped, each by a coin of its own row; test labels
    stay clean.
    """
    pairs = []
    for row in rows:
        preferred = row[objective.label]
        if preferred is None:
            continue
        if row["split"] != "test" and uniform_of("noise", seed, name, row["id"]) < noise:
            preferred = 1 - preferred
        pairs.append(
            {key: row[key] for key in ("id", "prompt", "split")}
            | {"chosen": row[RESPONSES[preferred]], "rejected": row[RESPONSES[1 - preferred]]}
            | {"chosen_ended": row.get(f"ended_{preferred}", True)}
            | {"rejected_ended": row.get(f"ended_{1 - preferred}", True)}
        )
    return pairs


def data_card(rows: Sequence[Row], pairs: Mapping[str, Sequence[Row]]) -> Row:
    """Counts that describe a preference set: rows and prompts per split, pairs and ties per objective."""
    card: Row = {
        "rows": dict(Counter(row["split"] for row in rows)),
        "prompts": dict(Counter(split for _, split in {(row["prompt"], row["split"]) for row in rows})),
        "objectives": {},
    }
    for name, chosen in pairs.items():
        longer = [len(pair["chosen"]) > len(pair["rejected"]) for pair in chosen]
        card["objectives"][name] = {
            "pairs": dict(Counter(pair["split"] for pair in chosen)),
            "ties": len(rows) - len(chosen),
            "longer_preferred": round(sum(longer) / len(longer), 4) if longer else None,
        }
    return card
