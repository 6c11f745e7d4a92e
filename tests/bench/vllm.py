"""Guided tokens per second inside vLLM: against the same engine without guidance, and against `GuidedDecoder`.

    .venv-vllm/bin/python -m tests.bench.vllm     # after `make repro` and `make vllm`; writes results/bench/vllm.csv

Every engine is a process of its own, one after the other, the whole round three times over; a line has medians and the
range, and `of_unguided` compares inside each round. `unguided` is vLLM without any adapter; `lanes` has the same rows
as `guided`, but each draws for itself by vLLM's sampler; `stock` is guidance with vLLM's own LoRA class for CPUs;
`decoder` is `GuidedDecoder`. `processor` is the share of a guided run's time that is spent in the logits processor.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from pipeline.decoding.request import Request
from pipeline.models.loading import Source

TOKENS, REPETITIONS = 32, 3
BATCHES = (1, 8, 32, 64)
ENGINES = ("unguided", "lanes", "guided", "stock", "decoder")
MODELS = Path("models")
ALPHAS = {1: {"positivity": 1.0}, 2: {"positivity": 1.0, "conciseness": 0.02}}  # the second hardly shortens


def prompts(batch: int) -> list[str]:
    return [f"Describe a rainy Monday morning, number {number}." for number in range(batch)]


def guided(decoder, count: int, batch: int) -> int:
    """Tokens that a decoder writes."""
    asked = [Request(prompt, ALPHAS[count], max_new_tokens=TOKENS, seed=7) for prompt in prompts(batch)]
    return sum(len(generation.tokens) for _, generation in decoder.generate(asked))


def plain(decoder, count: int, batch: int) -> int:
    """Tokens of the base's lanes where every lane of as many requests samples for itself, by vLLM's own sampler."""
    from vllm import SamplingParams

    engine, arms = decoder._engine, list(decoder._adapters.values())[:count]
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts(batch)):
        ids = {"prompt_token_ids": decoder._prompter.prompt_ids(prompt)}
        for lane, adapter in enumerate([None, *arms]):
            engine.add_request(f"{number}.{lane}", ids, params, lora_request=adapter)
    while engine.has_unfinished_requests():
        engine.step()
    return batch * TOKENS


def timed(kind, name: str, spent: list[float]) -> None:
    """Note the time of every call of a method."""
    method = getattr(kind, name)

    def call(*given):
        started = time.perf_counter()
        found = method(*given)
        spent.append(time.perf_counter() - started)
        return found

    setattr(kind, name, call)


def measured(engine: str) -> dict[str, tuple[float, float]]:
    """By `arms,batch`, tokens per second with prompts included, and the processor's share of the time.

    All responses inside vLLM have the same length.
    """
    arms, source = {name: MODELS / "arms" / name for name in ALPHAS[2]}, Source(MODELS / "smollm2-135m")
    if engine == "decoder":
        from pipeline.decoding.decoder import GuidedDecoder

        decoder: Any = GuidedDecoder.load(source, arms, batch_size=max(BATCHES))
    else:
        from pipeline.decoding.vllm.decoder import VllmDecoder

        room: Any = {"max_model_len": 256, "max_num_batched_tokens": 16384}
        decoder = VllmDecoder(source, {} if engine == "unguided" else arms, batch_size=max(BATCHES), **room)
        decoder._ends = []
    spent: list[float] = []
    if engine == "guided":
        from pipeline.decoding.vllm.runner_v1 import LaneProcessorV1

        for name in ("apply", "update_state"):
            timed(LaneProcessorV1, name, spent)
    write = plain if engine in ("unguided", "lanes") else guided
    found = {}
    for count in {"unguided": (0,), "stock": (2,)}.get(engine, (1, 2)):
        write(decoder, count, 2)
        for batch in BATCHES[:3] if engine == "stock" else BATCHES:
            spent.clear()
            started = time.perf_counter()
            tokens = write(decoder, count, batch)
            seconds = time.perf_counter() - started
            found[f"{count},{batch}"] = tokens / seconds, sum(spent) / seconds
    return found


def main() -> None:
    """Measure all engines in turn, or one of them for the process above."""
    if len(sys.argv) > 1:
        print(json.dumps(measured(sys.argv[1])))
        return
    runs: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for repetition in range(REPETITIONS):
        for engine in ENGINES:
            plugins = {"VLLM_PLUGINS": "none"} if engine == "stock" else {}
            environment = {"VLLM_CPU_KVCACHE_SPACE": "3", **os.environ, **plugins}
            done = subprocess.run(
                [sys.executable, "-m", "tests.bench.vllm", engine], env=environment, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            for cell, found in json.loads(done.stdout.splitlines()[-1]).items():
                arms, batch = map(int, cell.split(","))
                runs.setdefault((engine, arms, batch), []).append(found)
            print(f"{repetition + 1} of {REPETITIONS}: {engine}", file=sys.stderr)
    lines = []
    for (engine, arms, batch), found in runs.items():
        speeds, shares = zip(*found, strict=True)
        ratios = [one / other for one, (other, _) in zip(speeds, runs["unguided", 0, batch], strict=True)]
        share = round(median(shares), 3) if engine == "guided" else None
        numbers = [round(value, 1) for value in (median(speeds), min(speeds), max(speeds))]
        lines.append((engine, arms, batch, *numbers, round(median(ratios), 2), share, len(speeds)))
    columns = ["engine", "arms", "batch", "tokens_per_s", "low", "high", "of_unguided", "processor", "repetitions"]
    table = pd.DataFrame(lines, columns=columns).sort_values(["arms", "batch", "engine"])
    print(table.to_string(index=False))
    table.to_csv("results/bench/vllm.csv", index=False)


if __name__ == "__main__":
    main()
