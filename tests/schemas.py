"""Small files as the published preference datasets have them: their names, columns and kinds of values.

The texts are made here, with a seed.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.tiny import FEELINGS

Rows = list[dict]


def _texts(seed: int, count: int) -> Iterator[tuple[str, str, str]]:
    """Question, better and worse response."""
    dice = random.Random(seed)
    for number in range(count):
        good, bad = dice.sample(FEELINGS[:6], 2), dice.sample(FEELINGS[6:], 2)
        yield (
            f"What is thing {number} of {seed} like?",
            f"It is {' and '.join(good)}.",
            f"It is {' and '.join(bad)}, so.",
        )


def _parquet(rows: Rows, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _jsonl(rows: Rows, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def _human(question: str) -> str:
    return f"\n\nHuman: Hello.\n\nAssistant: Hello, what is it?\n\nHuman: {question}\n\nAssistant:"


def full_hh_rlhf(folder: Path, count: int = 30) -> None:
    for seed, split in enumerate(("train", "test")):
        rows = [
            {"prompt": _human(q), "response": f" {good}", "chosen": f" {good}", "rejected": f" {bad}"}
            for q, good, bad in _texts(seed, count)
        ]
        _parquet(rows, folder / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet")


def hh_rlhf(folder: Path, count: int = 30) -> None:
    seed = 0
    for part in ("harmless-base", "helpful-base"):
        for split in ("train", "test"):
            seed += 1
            rows = [
                {"chosen": f"{_human(q)} {good}", "rejected": f"{_human(q)} {bad}"}
                for q, good, bad in _texts(seed, count)
            ]
            _jsonl(rows, folder / part / f"{split}.jsonl.gz")


def pku_saferlhf_10k(folder: Path, count: int = 80) -> None:
    dice, rows = random.Random(7), []
    for question, good, bad in _texts(0, count):
        better, safer = dice.randint(0, 1), dice.randint(0, 1)
        rows.append(
            {
                "prompt": question, "response_0": [bad, good][better == 0], "response_1": [bad, good][better == 1],
                "is_response_0_safe": safer == 0, "is_response_1_safe": True,
                "better_response_id": better, "safer_response_id": safer,
            }
        )  # fmt: skip
    _parquet(rows, folder / "data" / "train-00000-of-00001.parquet")


def ultrafeedback_binarized(folder: Path, count: int = 30) -> None:
    def said(question: str, answer: str) -> Rows:
        return [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}]

    for seed, split in enumerate(("train_prefs", "test_prefs", "train_sft")):
        rows = [
            {
                "prompt": q, "prompt_id": f"{seed}{number}", "chosen": said(q, good), "rejected": said(q, bad),
                "messages": said(q, good), "score_chosen": 8.5, "score_rejected": 8.5 if number == 3 else 6.0,
            }
            for number, (q, good, bad) in enumerate(_texts(seed, count))
        ]  # fmt: skip
        _parquet(rows, folder / "data" / f"{split}-00000-of-00001.parquet")


WRITERS: dict[str, Callable[[Path], None]] = {
    "full_hh_rlhf": full_hh_rlhf,
    "hh_rlhf": hh_rlhf,
    "pku_saferlhf_10k": pku_saferlhf_10k,
    "ultrafeedback_binarized": ultrafeedback_binarized,
}


def alpaca_eval(folder: Path, count: int = 6) -> Path:
    """A JSON list, as `alpaca_eval.json` is; its path is returned."""
    rest = {"dataset": "helpful_base", "output": "x", "generator": "y"}
    rows = [{"instruction": f"Question {number}?", **rest} for number in range(count)]
    path = folder / "alpaca_eval.json"
    path.write_text(json.dumps(rows, indent=2))
    return path
