"""The data card: what a preference set holds, what was left out and why."""

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from itertools import combinations

import numpy as np

from pipeline.config.errors import UserError
from pipeline.config.schema import Objective
from pipeline.data.files import Row
from pipeline.data.splits import RESPONSES

_EXAMPLES = 5  # places named for each reason
_MOJIBAKE = re.compile("Ã[\x80-\xbf]|â€[™œ\x9d“”¦]")  # UTF-8 that was read as Windows-1252 or Latin-1
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_FOREIGN = 1.5  # UTF-8 bytes per character above which most letters are not Latin ones


class DataCard:
    """Counts of one pass over the rows.

    Args:
        objectives: with their label columns.
        strict: a row that is left out is an error instead.
        control: names of control tokens; texts that hold one are odd, and are read as texts.
    """

    def __init__(
        self, objectives: Mapping[str, Objective], strict: bool = False, control: Collection[str] = ()
    ) -> None:
        self._objectives = objectives
        self._strict = strict
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self._dropped: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = defaultdict(list)
        self._rows: Counter[str] = Counter()
        self._prompts: dict[str, set[int]] = defaultdict(set)
        self._pairs: dict[str, Counter[str]] = {name: Counter() for name in objectives}
        self._compared: Counter[str] = Counter()  # rows that are of an objective; those of two sentences are of one
        self._longer: Counter[str] = Counter()
        self._unequal: Counter[str] = Counter()
        self._both: Counter[str] = Counter()
        self._conflicts: Counter[str] = Counter()
        self._oddities: Counter[str] = Counter()
        self._lengths = {"prompt": array("L"), "response": array("L")}

    def drop(self, reason: str, where: str) -> None:
        """Count a row that is left out.

        Raises:
            UserError: nothing may be left out (data.strict).
        """
        if self._strict:
            raise UserError(f"{where}: {reason}: correct or remove it, or set data.strict=false to leave it out.")
        self._dropped[reason] += 1
        if len(self._examples[reason]) < _EXAMPLES:
            self._examples[reason].append(where)

    def keep(self, row: Row, pairs: Mapping[str, Row | None]) -> None:
        """Count a row that is kept, and the pairs that objectives make of it (None: no preference)."""
        split, texts = row["split"], [row[key] for key in RESPONSES]
        self._rows[split] += 1
        self._prompts[split].add(hash(row["prompt"]))
        self._lengths["prompt"].append(len(row["prompt"]))
        self._lengths["response"].extend(map(len, texts))
        for name, pair in pairs.items():
            if pair is not None:
                self._pairs[name][split] += 1
                self._longer[name] += len(pair["chosen"]) > len(pair["rejected"])
                self._unequal[name] += len(pair["chosen"]) != len(pair["rejected"])
        labels = {name: row[objective.label] for name, objective in self._objectives.items() if objective.label in row}
        self._compared.update(list(labels))
        for one, two in combinations(labels, 2):
            if labels[one] is not None and labels[two] is not None:
                self._both[f"{one}, {two}"] += 1
                self._conflicts[f"{one}, {two}"] += labels[one] != labels[two]
        whole = "\n".join([row["prompt"], *texts])
        self._oddities.update(_oddities(whole))
        if self._control.search(whole):
            self._oddities["names of control tokens"] += 1

    def summary(self) -> Row:
        """The card as a JSON value; shares are None where there is nothing to share."""
        kept = sum(self._rows.values())
        return {
            "read": kept + sum(self._dropped.values()),
            "dropped": {
                reason: {"rows": count, "such as": self._examples[reason]}
                for reason, count in self._dropped.most_common()
            },
            "rows": dict(self._rows),
            "prompts": {split: len(prompts) for split, prompts in self._prompts.items()},
            "objectives": {
                name: {
                    "pairs": dict(counts),
                    "ties": self._compared[name] - sum(counts.values()),
                    "longer_preferred": _share(self._longer[name], self._unequal[name]),
                }
                for name, counts in self._pairs.items()
            },
            "conflicts": {
                both: {"rows": count, "rate": _share(self._conflicts[both], count)}
                for both, count in self._both.items()
            },
            "characters": {part: _quantiles(lengths) for part, lengths in self._lengths.items()},
            "oddities": dict(self._oddities.most_common()),
        }


def _oddities(text: str) -> list[str]:
    if text.isascii() and not _CONTROL.search(text):
        return []
    signs = {
        "replacement characters": "\ufffd" in text,
        "control characters": _CONTROL.search(text) is not None,
        "wrongly decoded text": _MOJIBAKE.search(text) is not None,
        "mostly other than Latin letters": len(text.encode()) > _FOREIGN * len(text),
    }
    return [name for name, seen in signs.items() if seen]


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _quantiles(lengths: array) -> dict[str, int]:
    if not lengths:
        return {}
    values = np.frombuffer(lengths, dtype=np.dtype("L"))
    return {name: int(np.quantile(values, at)) for name, at in {"median": 0.5, "p99": 0.99, "longest": 1.0}.items()}
