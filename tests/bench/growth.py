"""Time and memory of what grows with use: judge and pareto on many rows, a store of a million: part of `make bench`.

    python -m tests.bench.growth                 # four minutes; 2 GiB of disk below scratch/
    python -m tests.bench.growth --rows 1000     # does it still run?

Writes results/bench/growth.csv: one line per stage and size, each a process of its own.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from pipeline.config.load import load_params
from pipeline.config.schema import Params
from pipeline.data.files import replacing, write_json, write_jsonl
from pipeline.data.responses import GeneratedRow, write_generated
from tests.tiny import ROOT

SCRATCH = Path("scratch/bench_growth")
OUT = Path("results/bench/growth.csv")
FIVE_POINTS = "~sweep.points.p075_c025", "~sweep.points.p025_c075"  # so that sizes are whole prompts
SIZES = (1_000, 10_000, 100_000)
STORED, ASKED = 1_000_000, 1_000
SECONDS, MEGABYTES = 5, 200  # that opening such a store may take
OPEN = f"""
import sys
from pathlib import Path
from pipeline.data.row_store import RowStore
stored = int(sys.argv[2])
store = RowStore(Path(sys.argv[1]), [f"{{number:032x}}" for number in range(0, stored, stored // {ASKED})])
"""
# Linux counts to a process what the one that started it held: a small one does.
STARTER = """
import os, sys
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def responses(count: int) -> Iterator[str]:
    """Texts of 20 to 200 words, all different."""
    dice = random.Random(0)
    words = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").split() if line.isalpha()]
    for _ in range(count):
        yield " ".join(dice.choices(words, k=dice.randint(20, 200)))


def rows(params: Params, count: int) -> Iterator[GeneratedRow]:
    """What generate writes, point by point at as many prompts as make so many rows."""
    points = list(params.sweep.points)
    for number, text in enumerate(responses(count)):
        size = len(text.split())
        yield GeneratedRow(
            point=points[number % len(points)], prompt=f"Question {number // len(points)}?", response=text,
            prompt_tokens=40, tokens=list(range(1000, 1000 + size)), n_tokens=size, finish="eos",
            logp=-1.5 * size, logp_base=-2.0 * size, kl=0.1 * size, sample=0, seed=0, stream=f"{number:032x}",
        )  # fmt: skip


def furnish(folder: Path, count: int) -> None:
    """The files that judge and pareto read, small but for the rows."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    composed = subprocess.run(
        [sys.executable, "-m", "pipeline", "sweep", "--cfg", "job", "--resolve", "tracking=disabled", *FIVE_POINTS],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    (folder / "params.yaml").write_text(composed.stdout, encoding="utf-8")
    params, results = load_params(folder / "params.yaml"), folder / "results"
    write_generated(results / "generate" / "rows.jsonl", rows(params, count))
    card = {
        "read": 1, "rows": {"train": 1}, "prompts": {"train": 1}, "characters": {}, "objectives": {}, "conflicts": {},
        "dropped": {}, "oddities": {},
    }  # fmt: skip
    arms = json.loads((ROOT / "results/pareto/metrics.json").read_text())["arms"]
    for name in params.objectives:
        pair = {"prompt": "Why?", "chosen": "Good, thanks.", "rejected": "Bad. " * 9, "split": "test"}
        write_jsonl(results / "prepare" / "pairs" / f"{name}.jsonl", [pair])
        write_json(results / "train" / name / "metrics.json", arms[name])
        curve = pd.DataFrame(
            [{"phase": "eval", "step": step, "loss": 0.6, "rewards/accuracies": 0.5} for step in (0, 1)]
        )
        curve.to_csv(results / "train" / name / "curve.csv", index=False)
        card["objectives"][name] = {"pairs": {"train": 1}, "ties": 0, "longer_preferred": None}
    write_json(results / "prepare" / "data_card.json", card)
    write_json(results / "explain" / "tokens.json", [])


def measured(what: str, count: int, command: list[str], folder: Path) -> dict[str, object]:
    """Seconds and peak megabytes of a command in a process of its own, imports included."""
    started = time.monotonic()
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", STARTER, sys.executable, *command], cwd=folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{what} failed: {done.stderr}"
    return {
        "what": what, "rows": count, "seconds": round(time.monotonic() - started, 1),
        "peak_mb": round(int(done.stderr.split()[-1]) / 1024),
    }  # fmt: skip


def write_store(path: Path, count: int) -> None:
    texts = list(responses(1000))
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            row = {"prompt": f"Question {number}?", "response": texts[number % 1000], "n_tokens": 130, "logp": -200.0}
            stream.write(json.dumps({"digest": f"{number:032x}", "row": row}) + "\n")


if __name__ == "__main__":
    parser = ArgumentParser("python -m tests.bench.growth")
    parser.add_argument("--rows", type=int, help="of all of it, to see whether it still runs")
    small = parser.parse_args().rows
    found = []
    for count in [small] if small else SIZES:
        furnish(SCRATCH / "run", count)
        for stage in ("judge", "pareto"):
            found.append(measured(stage, count, ["-m", "pipeline", stage], SCRATCH / "run"))
    stored = small or STORED
    write_store(SCRATCH / "store.jsonl", stored)
    found.append(measured("open a store", stored, ["-c", OPEN, "store.jsonl", str(stored)], SCRATCH))
    table = pd.DataFrame(found)
    if not small:
        with replacing(OUT) as stream:
            table.to_csv(stream, index=False)
    print(table.to_string(index=False))
    shutil.rmtree(SCRATCH)
    fits = found[-1]["seconds"] < SECONDS and found[-1]["peak_mb"] < MEGABYTES
    sys.exit(0 if fits else f"a store of {stored} rows took more than {SECONDS} s or {MEGABYTES} MB")
