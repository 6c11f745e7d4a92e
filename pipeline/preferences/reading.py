"""Rows and prompts of files, checked: what cannot be used is left out and counted, what is malformed stops the run.

Datasets spell preferences in several ways, and a row says by its fields which one is its own:

* `response_0`, `response_1` and a label column for each objective (PKU-SafeRLHF);
* `prompt`, `chosen`, `rejected` (TRL's explicit prompt, HH-RLHF by Dahoas), perhaps with the `objective`;
* `chosen` and `rejected` that begin with the same prompt (TRL's implicit prompt, Anthropic's HH-RLHF).

Each of the texts may be a list of messages instead (UltraFeedback, TRL's conversational formats).
"""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from math import isnan
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.config import UserError
from pipeline.params import Data, Objective
from pipeline.preferences import RESPONSES, SPLITS, split_of
from pipeline.preferences.card import DataCard
from pipeline.preferences.dialogues import (
    UnfitError,
    answer,
    divided,
    divided_messages,
    is_messages,
    spelled,
)
from pipeline.preferences.sources import files_of, read
from pipeline.store import Row, digest

_HELD_OUT = {"validation": 1, "test": 2}  # a prompt that is in several splits belongs to the one that is held out most


def read_rows(data: Data, objectives: Mapping[str, Objective], seed: int, card: DataCard) -> Iterator[Row]:
    """Preference rows: `id`, `prompt`, `split`, two responses and one label per objective.

    They are read twice, the first time for the prompts that are held out, and never held in memory. `card` counts what
    is left out; the caller counts what is kept.

    Raises:
        UserError: a malformed line, a missing label, a repeated id; or with data.strict a row that would be left out
            (file and line are named).
    """
    held_out, known = _held_out(data, objectives), _Known()
    limited = _Limit(data.limits)
    carved = {split for split in _HELD_OUT if data.files and split not in data.files}
    for where, raw, stated in _raw_rows(data, "rows of"):
        row: Row = {"id": _place(where, data) if raw.get("id") is None else str(raw["id"])}
        if not known.fresh("id", row["id"]):
            raise UserError(f"{where}: the id {row['id']} was there before: make ids unique.")
        try:
            row |= _texts(raw, objectives, where)
            if row["response_0"].strip() == row["response_1"].strip():
                raise UnfitError("equal responses")
            split = stated or _stated(raw, where)
            owner = held_out.get(_key(row["prompt"]))
            if owner is not None and split not in (None, owner):
                raise UnfitError(f"a prompt that is in split {owner} as well")
            drawn = split_of(row["prompt"], data, seed)
            row["split"] = owner or (drawn if split is None or drawn in carved else split)
            texts = sorted(row[key] for key in RESPONSES)
            if not known.fresh("row", row["prompt"], *texts, str(raw.get("objective", ""))):
                raise UnfitError("a row that was there before")
        except UnfitError as reason:
            card.drop(str(reason), where)
            continue
        if limited.admits(row):
            yield row


def read_prompts(data: Data, seed: int) -> list[Row]:
    """Prompts of a file: `id`, `prompt`, `split`.

    Raises:
        UserError: a malformed line, a missing or repeated prompt (file and line are named).
    """
    seen, prompts, limited = dict[str, str](), list[Row](), _Limit(data.limits)
    for where, raw in read(Path(data.path)):
        row = _renamed(raw, data.columns)
        prompt = _prompt(row, where)
        if prompt in seen:
            raise UserError(f"{where}: the prompt of {seen[prompt]} again: remove one of them.")
        seen[prompt] = where.rpartition(", ")[2]
        split = _stated(row, where) or split_of(prompt, data, seed)
        prompts.append({"id": digest(prompt)[:12], "prompt": prompt, "split": split})
    return [prompt for prompt in prompts if limited.admits(prompt)]


class Prompts:
    """The prompts that were read: those of split test as they are, of the others only that they are known."""

    def __init__(self) -> None:
        self._test: dict[str, None] = {}
        self._trained: set[int] = set()

    def add(self, row: Row) -> None:
        """Note the prompt of a row and its split."""
        if row["split"] == "test":
            self._test[row["prompt"]] = None
        else:
            self._trained.add(_key(row["prompt"]))

    def unseen(self, data: Data) -> list[str]:
        """The prompts to generate from: those of split test, or those of the file `data.prompts`.

        Raises:
            UserError: a malformed line, or a prompt that the ARMs are trained or chosen on.
        """
        if data.prompts == data.path:
            return list(self._test)
        found = dict[str, None]()
        for where, raw in read(Path(data.prompts)):
            prompt = _prompt(_renamed(raw, data.columns), where)
            if prompt in found:
                raise UserError(f"{where}: the prompt is there already: remove one of them.")
            if _key(prompt) in self._trained:
                raise UserError(f"{where}: the ARMs have seen this prompt in {data.path}: remove it from one of them.")
            found[prompt] = None
        return list(found)[: data.limits.get("test")]


def _raw_rows(data: Data, doing: str, but: str | None = None) -> Iterator[tuple[str, Row, str | None]]:
    for split, file in files_of(data):
        if split is not None and split == but:
            continue
        for where, raw in tqdm(read(file), f"prepare: {doing} {file.name}", unit="row", mininterval=1.0):
            yield where, _renamed(raw, data.columns), split


def _place(where: str, data: Data) -> str:
    """What identifies a row without an id: its number, in a folder with its file."""
    return where.removeprefix(f"{data.path}/") if Path(data.path).is_dir() else where.rpartition(" ")[2]


def _renamed(raw: Row, columns: Mapping[Any, str]) -> Row:
    """The row with our names for the columns that are called otherwise in the files."""
    return {**raw, **{ours: raw[theirs] for ours, theirs in columns.items() if theirs in raw}}


def _held_out(data: Data, objectives: Mapping[str, Objective]) -> dict[int, str]:
    """The validation and test prompts that files or rows state, by key."""
    found: dict[int, str] = {}
    for where, raw, stated in _raw_rows(data, "held-out prompts of", but="train"):
        split = stated or _stated(raw, where)
        if split not in _HELD_OUT:
            continue
        try:
            key = _key(_texts(raw, objectives, where)["prompt"])
        except UnfitError:
            continue
        if _HELD_OUT[split] > _HELD_OUT.get(found.get(key, ""), 0):
            found[key] = split
    return found


def _stated(row: Row, where: str) -> str | None:
    split = row.get("split")
    if split is None or split in SPLITS:
        return split
    raise UserError(f"{where}: split is {split!r}: use one of {', '.join(SPLITS)}, or leave it out.")


def _prompt(row: Row, where: str) -> str:
    try:
        return _text(row, "prompt", where)
    except UnfitError as reason:
        raise UserError(f"{where}: {reason}: correct or remove the line.") from reason


def _texts(raw: Row, objectives: Mapping[str, Objective], where: str) -> Row:
    """Prompt, responses and labels, however the row spells them."""
    if "chosen" not in raw:
        row = {key: _text(raw, key, where) for key in ("prompt", *RESPONSES)}
        return row | {objective.label: _label(raw, name, objective, where) for name, objective in objectives.items()}
    prompt, chosen, rejected = _compared(raw, where)
    for key, text in {"prompt": prompt, "chosen": chosen, "rejected": rejected}.items():
        if not text.strip():
            raise UnfitError(f"an empty {key}")
    name = raw.get("objective", next(iter(objectives)) if len(objectives) == 1 else None)
    if not isinstance(name, str) or name not in objectives:
        raise UserError(f"{where}: objective is {name!r}: use one of {', '.join(objectives)}.")
    scores = raw.get("score_chosen"), raw.get("score_rejected")
    tied = scores[0] is not None and scores[0] == scores[1]
    labels = {objective.label: 0 if other == name and not tied else None for other, objective in objectives.items()}
    return {"prompt": prompt, "response_0": chosen, "response_1": rejected, **labels}


def _compared(raw: Row, where: str) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of a row that has the latter two."""
    chosen: Any = raw["chosen"]
    rejected: Any = raw.get("rejected")
    if is_messages(chosen) and is_messages(rejected):
        if len(chosen) == len(rejected) == 1 and raw.get("prompt") is not None:
            return _text(raw, "prompt", where), answer(chosen), answer(rejected)
        return divided_messages(chosen, rejected)
    if raw.get("prompt") is None:
        return divided(_text(raw, "chosen", where), _text(raw, "rejected", where))
    prompt, better, worse = (_text(raw, key, where) for key in ("prompt", "chosen", "rejected"))
    return prompt, better, worse


def _text(row: Row, key: str, where: str) -> str:
    if key not in row:
        raise UserError(
            f"{where}: no column {key}, only {', '.join(map(str, row))}: set data.columns.{key} to one of them."
        )
    value = row[key]
    if is_messages(value):
        return spelled(value) if key == "prompt" else answer(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UnfitError(f"an empty {key.partition('_')[0]}")
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {value!r:.80}: it must be a text or a list of messages.")
    return value


def _label(raw: Row, name: str, objective: Objective, where: str) -> int | None:
    if objective.label not in raw:
        raise UserError(
            f"{where}: the objective {name} has no label column {objective.label}: add it, or set "
            f"objectives.{name}.label to one of {', '.join(map(str, raw))}."
        )
    label: Any = raw[objective.label]
    if isinstance(label, float) and (isnan(label) or label in (0.0, 1.0)):  # CSV and Parquet know no null integers
        label = None if isnan(label) else int(label)
    if label not in (0, 1, None) or isinstance(label, bool | float):
        raise UserError(f"{where}: {objective.label} is {label!r}: use 0, 1, or null for a tie.")
    return None if label is None else int(label)


def _key(*parts: str) -> int:
    """A number that stands for texts: sets of them are small, whatever the texts."""
    whole = blake2b(digest_size=8)
    for part in parts:
        whole.update(part.encode(errors="surrogatepass") + b"\0")
    return int.from_bytes(whole.digest(), "big")


class _Known:
    """What was seen, remembered by key."""

    def __init__(self) -> None:
        self._keys: set[int] = set()

    def fresh(self, *parts: str) -> bool:
        key = _key(*parts)
        if key in self._keys:
            return False
        self._keys.add(key)
        return True


class _Limit:
    """Admits the rows of the first prompts of each split."""

    def __init__(self, limits: Mapping[Any, int]) -> None:
        self._limits = limits
        self._prompts: dict[str, set[int]] = {split: set() for split in limits}

    def admits(self, row: Row) -> bool:
        if row["split"] not in self._limits:
            return True
        key, prompts = _key(row["prompt"]), self._prompts[row["split"]]
        if len(prompts) < self._limits[row["split"]]:
            prompts.add(key)
        return key in prompts
