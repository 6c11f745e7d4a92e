"""The server under load: 64 requests at once, then 20,000 with 64 of them at any time.

    make soak    # after `make repro`; hours on two cores; writes results/bench/serve.csv; FLAGS="--many 2000"
    make soak FLAGS="--tiny"    # a random model, with a table of its own: minutes; what piles up per request shows

A quarter of the requests are malformed (`tests.decoding.fuzz`); the others are guided or not, whole or streamed, and
some clients leave after the first piece. An answer is whole if it ended by itself or has all the tokens it may have.
Times are a client's: to the first piece of a stream, and from piece to piece. In the end nothing may be lost, no
malformed body may have been an internal error, and memory may not have grown over the second half.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import psutil
from omegaconf import OmegaConf

from tests.decoding.fuzz import fuzzed
from tests.tiny import ROOT, tiny_model, tiny_tokenizer, write_adapter, write_project

PORT, AT_ONCE, MANY, WINDOWS = 8017, 64, 20_000, 10
WEIGHTS = [{"positivity": step / 4, "conciseness": (4 - step) / 40} for step in range(5)]
KINDS = ["guided", "streamed", "unguided", "malformed", "guided", "left", "streamed", "malformed"]
ANSWERS = {200, 400, 404, 413, 422}  # that a malformed body may get


@dataclass
class Window:
    """What happened to some requests in a row."""

    answers: int = 0  # to requests that are in order, and whose clients stayed
    whole: int = 0
    malformed: int = 0
    internal_errors: int = 0  # that a malformed body got
    tokens: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first piece
    gaps: list[float] = field(default_factory=list)  # seconds from piece to piece

    def line(self, name: str, seconds: float, memory: dict[str, float]) -> dict[str, Any]:
        """As a line of the table."""
        times = {
            f"{what}_p{share}_ms": 1000 * float(np.percentile(values, share)) if values else np.nan
            for what, values in (("first_token", self.first), ("per_token", self.gaps))
            for share in (50, 99)
        }
        return {
            "requests": name, "answers": self.answers, "whole": self.whole, "malformed": self.malformed,
            "internal_errors": self.internal_errors, "tokens": self.tokens, "seconds": seconds,
            "tokens_per_s": self.tokens / seconds, **times, **memory,
        }  # fmt: skip


class Load:
    """Clients of a server.

    Args:
        address: of the server, up to `/v1`.
        model: the base's name.
        key: the server's API key.
        size: tokens of an answer.
    """

    def __init__(self, address: str, model: str, key: str = "none", size: int = 8) -> None:
        self._address, self._model, self._size = address, model, size
        # The server closes what is idle for five seconds; a client that waits as long may write to what is just closed.
        limits = httpx.Limits(max_connections=AT_ONCE, keepalive_expiry=1)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._client = httpx.AsyncClient(timeout=600, limits=limits, headers=headers)

    async def run(self, numbers: range, window: Window) -> None:
        """Send the requests of these numbers, `AT_ONCE` at any time."""
        waiting = iter(numbers)

        async def client() -> None:
            for number in waiting:
                await self._send(number, window)

        async with asyncio.TaskGroup() as clients:
            for _ in range(min(AT_ONCE, len(numbers))):
                clients.create_task(client())

    async def close(self) -> None:
        """Leave."""
        await self._client.aclose()

    async def _send(self, number: int, window: Window) -> None:
        kind = KINDS[number % len(KINDS)]
        path = f"{self._address}/chat/completions"
        if kind == "malformed":
            window.malformed += 1
            answer = await self._client.post(path, content=fuzzed(number, self._model))
            window.internal_errors += answer.status_code not in ANSWERS
            return
        body: dict[str, Any] = {
            "model": self._model, "max_tokens": self._size, "seed": number,
            "messages": [{"role": "user", "content": f"Describe a rainy Monday morning, number {number}."}],
        }  # fmt: skip
        if kind != "unguided":
            body["guidance"] = {"weights": WEIGHTS[number % len(WEIGHTS)]}
        if kind in ("streamed", "left"):
            await self._stream(path, body, window, leave=kind == "left")
            return
        window.answers += 1
        answer = (await self._client.post(path, json=body)).json()
        self._count(window, answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"])

    async def _stream(self, path: str, body: dict[str, Any], window: Window, leave: bool) -> None:
        begun, before, finish, tokens = time.perf_counter(), None, None, 0
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with self._client.stream("POST", path, json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                piece, now = json.loads(line.removeprefix("data: ")), time.perf_counter()
                tokens = (piece.get("usage") or {}).get("completion_tokens", tokens)
                for choice in piece.get("choices", []):
                    finish = choice.get("finish_reason") or finish
                    if choice["delta"].get("content"):
                        (window.first if before is None else window.gaps).append(now - (before or begun))
                        before = now
                if leave and before is not None:
                    return
        window.answers += not leave
        if not leave:
            self._count(window, finish, tokens)

    def _count(self, window: Window, finish: str | None, tokens: int) -> None:
        window.tokens += tokens
        window.whole += finish == "stop" or tokens == self._size


@contextmanager
def server(folder: Path) -> Iterator[psutil.Process]:
    """The server that `make serve` starts in a folder."""
    flags = ["--port", str(PORT), "--groups", "32", "--", "--max-model-len", "512", "--max-num-batched-tokens", "8192"]
    # Pages of the cache count once they are written to: a small one is soon all there, and what grows then is not it.
    flags += ["--num-gpu-blocks-override", "200"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "PYTHONPATH": str(ROOT), **os.environ}
    with subprocess.Popen([sys.executable, "-m", "pipeline", "serve", *flags], cwd=folder, env=environment) as process:
        try:
            while process.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health")
                    break
                except OSError:
                    time.sleep(1)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def held(process: psutil.Process) -> dict[str, float]:
    """GiB of memory that the server's processes hold: all of them, and what takes requests without the engine."""
    front, *others = (each.memory_info().rss / 2**30 for each in (process, *process.children(recursive=True)))
    return {"memory_gib": front + sum(others), "memory_front_gib": front}


async def soak(process: psutil.Process, address: str, model: str, many: int, key: str = "none") -> pd.DataFrame:
    """Both loads, as the lines of a table."""
    lines = []
    windows = [("64 at once", range(many, many + AT_ONCE), 48)]
    every = max(1, many // WINDOWS)
    windows += [(f"{start + 1} to {start + every}", range(start, start + every), 8) for start in range(0, many, every)]
    for name, numbers, size in windows:
        load, window, begun = Load(address, model, key, size), Window(), time.perf_counter()
        await load.run(numbers, window)
        await load.close()
        lines.append(window.line(name, time.perf_counter() - begun, held(process)))
        print(pd.DataFrame(lines[-1:]).round(2).to_string(index=False), flush=True)
    return pd.DataFrame(lines).round(2)


def faults(table: pd.DataFrame) -> list[str]:
    """What must not have happened, each as a sentence."""
    found = []
    if lost := int((table.answers - table.whole).sum()):
        found.append(f"{lost} answers are not whole.")
    if errors := int(table.internal_errors.sum()):
        found.append(f"{errors} malformed bodies were internal errors.")
    half = table.memory_gib[1:].tolist()[(len(table) - 1) // 2 :]
    if max(half) > 1.02 * half[0]:
        found.append(f"memory grew from {half[0]} to {max(half)} GiB over the second half.")
    return found


def tiny_project(folder: Path) -> Path:
    """A project with a random base and two random ARMs, as wide as vLLM's attention wants them."""
    base = folder / "base"
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), context=512, width=128).save_pretrained(base)
    tokenizer.save_pretrained(base)
    targets = ["q_proj", "v_proj", "down_proj"]
    arms = {name: write_adapter(base, folder / name, seed, targets) for seed, name in enumerate(WEIGHTS[0])}
    return write_project(folder, base, arms)


def main() -> None:
    """Start, load, write the table."""
    parser = argparse.ArgumentParser("python -m tests.bench.serve")
    parser.add_argument("--many", type=int, default=MANY, help="requests behind the 64 at once")
    parser.add_argument("--tiny", action="store_true", help="a random model, and results/bench/serve_tiny.csv")
    options = parser.parse_args()
    file = Path("results/bench/serve_tiny.csv" if options.tiny else "results/bench/serve.csv")
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_project(Path(scratch)) if options.tiny else Path()
        model = OmegaConf.load(folder / "params.yaml").base
        with server(folder) as process:
            table = asyncio.run(soak(process, f"http://127.0.0.1:{PORT}/v1", model, options.many))
    table.to_csv(file, index=False)
    if sentences := faults(table):
        raise SystemExit("\n".join(sentences))


if __name__ == "__main__":
    main()
