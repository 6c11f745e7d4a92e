"""The server under load: 64 guided requests at once with mixed weights, then 2,000 one after the other.

    .venv-vllm/bin/python -m tests.bench.serve    # after `make repro` and `make vllm`; writes results/bench/serve.csv

An answer is whole if it ended by itself or has all the tokens that were asked for. Every 200 requests, what the
server's processes hold in memory.
"""

import asyncio
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import psutil
from openai import AsyncOpenAI
from tqdm.asyncio import tqdm

PORT, AT_ONCE, MANY, EVERY = 8017, 64, 2000, 200
WEIGHTS = [{"positivity": step / 4, "conciseness": (4 - step) / 40} for step in range(5)]


@contextmanager
def server() -> Iterator[psutil.Process]:
    """The server that `make serve` starts."""
    flags = ["--port", str(PORT), "--groups", "32", "--", "--max-model-len", "512", "--max-num-batched-tokens", "8192"]
    # Pages of the cache count once they are written to: a small one is soon all there, and what grows then is not it.
    flags += ["--num-gpu-blocks-override", "200"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}
    with subprocess.Popen([sys.executable, "-m", "pipeline.decoding.vllm.serve", *flags], env=environment) as process:
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


async def ask(client: AsyncOpenAI, number: int, size: int) -> tuple[str, int, str]:
    """One guided answer: its text, how many tokens it has, and why it ended."""
    said = await client.chat.completions.create(
        model="smollm2-135m", max_tokens=size, seed=number,
        messages=[{"role": "user", "content": f"Describe a rainy Monday morning, number {number}."}],
        extra_body={"guidance": {"weights": WEIGHTS[number % len(WEIGHTS)]}},
    )  # fmt: skip
    return said.choices[0].message.content, said.usage.completion_tokens, said.choices[0].finish_reason


def held(process: psutil.Process) -> float:
    """GiB of memory that the server's processes hold."""
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / 2**30


async def load(process: psutil.Process) -> pd.DataFrame:
    """Both loads, as the lines of a table."""
    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", timeout=600, max_retries=0)
    lines = []

    def note(what: str, answers: list[tuple[str, int, str]], started: float) -> None:
        seconds, tokens = time.perf_counter() - started, sum(size for _, size, _ in answers)
        right = sum(finish == "stop" or size == wanted for _, size, finish in answers)
        lines.append((what, len(answers), right, tokens, seconds, tokens / seconds, held(process)))

    wanted, started = 48, time.perf_counter()
    note("64 at once", await asyncio.gather(*(ask(client, number, wanted) for number in range(AT_ONCE))), started)
    wanted, room = 8, asyncio.Semaphore(AT_ONCE)

    async def soon(number: int) -> tuple[str, int, str]:
        async with room:
            return await ask(client, number, wanted)

    for begun in range(0, MANY, EVERY):
        started = time.perf_counter()
        answers = await tqdm.gather(*(soon(number) for number in range(begun, begun + EVERY)), desc=f"{begun}")
        note(f"{begun + 1} to {begun + EVERY}", answers, started)
    columns = ["requests", "answers", "whole", "tokens", "seconds", "tokens_per_s", "memory_gib"]
    return pd.DataFrame(lines, columns=columns).round(2)


def main() -> None:
    """Start, load, write the table."""
    with server() as process:
        table = asyncio.run(load(process))
    print(table.to_string(index=False))
    table.to_csv("results/bench/serve.csv", index=False)


if __name__ == "__main__":
    main()
