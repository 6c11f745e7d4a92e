"""Memory and speed of `prepare` on a file of a gibibyte: part of `make bench`.

    python -m tests.bench.prepare            # two minutes; 4 GiB of disk below scratch/
    python -m tests.bench.prepare --mib 64   # does it still run?

Writes results/bench/prepare.csv: one line per format, each a process of its own.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.chat import spelled
from pipeline.data.files import replacing
from tests.tiny import ROOT, tiny_tokenizer

SCRATCH = Path("scratch/bench_prepare")
OUT = Path("results/bench/prepare.csv")
LIMIT = 1.5  # GiB of resident memory that preparing a gibibyte may take


def rows(mib: int):
    """Dialogues with two answers, all different, until they are so many MiB of JSON."""
    dice = random.Random(0)
    words = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").split() if line.isalpha()]
    written = 0
    while written < mib * 2**20:
        question, first, chosen, rejected = (" ".join(dice.choices(words, k=dice.randint(10, 90))) for _ in range(4))
        turns = [("user", question), ("assistant", first), ("user", chosen[:40])]
        prompt = spelled([{"role": role, "content": text} for role, text in turns])
        row = {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
        written += len(json.dumps(row)) + 1
        yield row


def write_jsonl(path: Path, mib: int) -> int:
    with path.open("w", encoding="utf-8") as stream:
        return sum(bool(stream.write(json.dumps(row) + "\n")) for row in rows(mib))


def write_parquet(path: Path, mib: int) -> int:
    count, batch = 0, []
    with pq.ParquetWriter(path, pa.schema([(key, pa.string()) for key in ("prompt", "chosen", "rejected")])) as writer:
        for row in rows(mib):
            batch.append(row)
            if len(batch) == 10_000:
                writer.write_table(pa.Table.from_pylist(batch))
                count, batch = count + len(batch), []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch))
    return count + len(batch)


def measured(path: Path) -> dict[str, float]:
    """Seconds and peak memory of the stage in a folder of its own."""
    overrides = ["data=own", f"data.path={path.resolve()}", "objectives=human_preference", "sweep=human_preference"]
    folder = SCRATCH / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    composed = subprocess.run(
        [sys.executable, "-m", "pipeline", "sweep", "--cfg", "job", "--resolve", *overrides],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    tiny_tokenizer().save_pretrained(folder / "models" / "smollm2-135m")  # whose control tokens are looked for
    (folder / "params.yaml").write_text(composed.stdout, encoding="utf-8")
    command, started = [sys.executable, "-m", "pipeline", "prepare"], time.monotonic()
    stage = subprocess.Popen(command, cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    _, status, usage = os.wait4(stage.pid, 0)  # of this process alone, not of all that ran before
    assert status == 0, "the stage failed"
    return {"seconds": round(time.monotonic() - started, 1), "peak_gib": round(usage.ru_maxrss / 2**20, 2)}


if __name__ == "__main__":
    parser = ArgumentParser("python -m tests.bench.prepare")
    parser.add_argument("--mib", type=int, default=1024)
    mib = parser.parse_args().mib
    SCRATCH.mkdir(parents=True, exist_ok=True)
    found = []
    for name, write in {"jsonl": write_jsonl, "parquet": write_parquet}.items():
        file = SCRATCH / f"rows.{name}"
        count = write(file, mib)
        size = file.stat().st_size >> 20
        line = {"file": name, "mib": mib, "mib_on_disk": size, "rows": count} | measured(file)
        found.append(line | {"rows_per_s": round(count / line["seconds"])})
        file.unlink()
    table = pd.DataFrame(found)
    if mib >= 1024:
        with replacing(OUT) as stream:
            table.to_csv(stream, index=False)
    print(table.to_string(index=False))
    shutil.rmtree(SCRATCH)
    sys.exit(0 if mib < 1024 or (table.peak_gib < LIMIT).all() else f"preparing it took more than {LIMIT} GiB")
