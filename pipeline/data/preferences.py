"""Rows and prompts of files, checked: what cannot be used is left out and counted, what is malformed stops the run."""

import json
import sys
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.config.errors import UserError
from pipeline.config.schema import Data, Objective
from pipeline.data.card import DataCard
from pipeline.data.chat import UnfitError
from pipeline.data.files import Row, digest
from pipeline.data.forms import prompt_of, texts_of, whole
from pipeline.data.sources import files_of, read
from pipeline.data.splits import RESPONSES, SPLITS, canonical, split_of

_HELD_OUT = {"validation": 1, "test": 2}  # a prompt that is in several splits belongs to the one that is held out most


def read_rows(data: Data, objectives: Mapping[str, Objective], seed: int, card: DataCard) -> Iterator[Row]:
    """Preference rows: `id`, `prompt`, `split`, two responses and one label per objective.

    They are read twice, the first time for the prompts that are held out, and never held in memory. `card` counts what
    is left out; the caller counts what is kept.

    Raises:
        UserError: a malformed line, a missing label, a repeated id; or with data.strict a row that would be left out
            (file and line are named).
    """
    held_out, ids, known = _held_out(data, objectives), set[int](), _Known(objectives)
    limited = _Limit(data.limits)
    carved = {split for split in _HELD_OUT if data.files and split not in data.files}
    for where, raw, stated in _raw_rows(data, "rows of"):
        row: Row = {"id": _place(where, data) if raw.get("id") is None else str(raw["id"])}
        if (key := _key(row["id"])) in ids:
            raise UserError(f"{where}: the id {row['id']} was there before: make ids unique.")
        ids.add(key)
        try:
            whole(row["id"], "id")
            row |= texts_of(raw, objectives, where)
            if row["response_0"].strip() == row["response_1"].strip():
                raise UnfitError("equal responses")
            split = stated or _stated(raw, where)
            owner = held_out.get(_prompt_key(row["prompt"]))
            if owner is not None and split not in (None, owner):
                raise UnfitError(f"a prompt that is in split {owner} as well")
            drawn = split_of(row["prompt"], data, seed)
            row["split"] = owner or (drawn if split is None or drawn in carved else split)
            known.add(row, str(raw.get("objective", "")))
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
    seen, prompts, limited = dict[int, str](), list[Row](), _Limit(data.limits)
    for where, raw in read(Path(data.path)):
        row = _renamed(raw, data.columns)
        prompt = _prompt(row, where)
        first = seen.setdefault(_prompt_key(prompt), where)
        if first != where:
            raise UserError(f"{where}: the prompt of {first.rpartition(', ')[2]} again: remove one of them.")
        split = _stated(row, where) or split_of(prompt, data, seed)
        prompts.append({"id": digest(prompt)[:12], "prompt": prompt, "split": split})
    return [prompt for prompt in prompts if limited.admits(prompt)]


class Prompts:
    """The prompts that were read: those of split test as they are, of the others only that they are known."""

    def __init__(self) -> None:
        self._test: dict[int, str] = {}
        self._trained: set[int] = set()

    def add(self, row: Row) -> None:
        """Note the prompt of a row and its split."""
        key = _prompt_key(row["prompt"])
        if row["split"] == "test":
            self._test.setdefault(key, row["prompt"])
        else:
            self._trained.add(key)

    def unseen(self, data: Data) -> list[str]:
        """The prompts to generate from: those of split test, or those of the file `data.prompts`.

        Raises:
            UserError: a malformed line, or a prompt that the ARMs are trained or chosen on.
        """
        if data.prompts == data.path:
            return list(self._test.values())
        kept_prompts = dict[int, str]()
        for where, raw in read(Path(data.prompts)):
            prompt = _prompt(_renamed(raw, data.columns), where)
            key = _prompt_key(prompt)
            if key in kept_prompts:
                raise UserError(f"{where}: the prompt is there already: remove one of them.")
            if key in self._trained:
                raise UserError(f"{where}: the ARMs have seen this prompt in {data.path}: remove it from one of them.")
            kept_prompts[key] = prompt
        return list(kept_prompts.values())[: data.limits.get("test")]


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
    held_out: dict[int, str] = {}
    for where, raw, stated in _raw_rows(data, "held-out prompts of", but="train"):
        split = stated or _stated(raw, where)
        if split not in _HELD_OUT:
            continue
        try:
            key = _prompt_key(texts_of(raw, objectives, where)["prompt"])
        except UnfitError:
            continue
        if _HELD_OUT[split] > _HELD_OUT.get(held_out.get(key, ""), 0):
            held_out[key] = split
    return held_out


def _stated(row: Row, where: str) -> str | None:
    split = row.get("split")
    if split is None or split in SPLITS:
        return split
    raise UserError(f"{where}: split is {split!r}: use one of {', '.join(SPLITS)}, or leave it out.")


def _prompt(row: Row, where: str) -> str:
    try:
        return prompt_of(row, where)
    except UnfitError as reason:
        raise UserError(f"{where}: {reason}: correct or remove the line.") from reason


def _key(*parts: str) -> int:
    """A number that stands for texts: sets of them are small, whatever the texts."""
    return int.from_bytes(blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big")


def _prompt_key(prompt: str) -> int:
    """The same for prompts that a reader takes for the same."""
    return _key(canonical(prompt))


class _Known:
    """The rows that were seen, and how they were labelled."""

    def __init__(self, objectives: Mapping[str, Objective]) -> None:
        self._columns = [objective.label for objective in objectives.values()]
        self._labels: dict[int, str] = {}

    def add(self, row: Row, objective: str) -> None:
        """Note a row.

        Raises:
            UnfitError: its texts were there before, in whichever order.
        """
        texts = [row[key] for key in RESPONSES]
        swapped = texts[0] > texts[1]
        key = _key(canonical(row["prompt"]), *sorted(texts), objective)
        signs = ("1", "0", "-") if swapped else ("0", "1", "-")
        labels = "".join(signs[2 if row[column] is None else row[column]] for column in self._columns)
        before = self._labels.get(key)
        if before is not None:
            raise UnfitError("a row that was there before" + (" with another label" if before != labels else ""))
        self._labels[key] = sys.intern(labels)


class _Limit:
    """Admits the rows of the first prompts of each split."""

    def __init__(self, limits: Mapping[Any, int]) -> None:
        self._limits = limits
        self._prompts: dict[str, set[int]] = {split: set() for split in limits}

    def admits(self, row: Row) -> bool:
        if row["split"] not in self._limits:
            return True
        key, prompts = _prompt_key(row["prompt"]), self._prompts[row["split"]]
        if len(prompts) < self._limits[row["split"]]:
            prompts.add(key)
        return key in prompts
