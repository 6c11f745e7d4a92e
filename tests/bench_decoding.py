"""Tokens per second of guided decoding beside the unguided base, interleaved in one run.

    make bench        # needs models/ from `dvc repro`; writes results/bench/decoding.csv

Rows: `model.generate` on the base alone (the floor), and `GuidedDecoder` with k ARMs at one weight vector each.
"""

import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from pipeline.config import Workspace, load_params
from pipeline.decoder import GuidedDecoder, Request, left_pad
from pipeline.models import Prompter, load_model, resolve_device, resolve_dtype
from pipeline.store import digest, read_jsonl, replacing

TOKENS, REPETITIONS = 32, 5


def unguided(model, prompter, prompts):
    ids, mask = left_pad([prompter.prompt_ids(prompt) for prompt in prompts], prompter.eos, model.device)
    model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=TOKENS, max_new_tokens=TOKENS
    )
    return TOKENS * len(prompts)


def guided(decoder, names, prompts):
    weights = dict.fromkeys(names, 1 / max(len(names), 1))
    rows = [Request(prompt, digest([prompt, time.time_ns()]), TOKENS, weights) for prompt in prompts]
    return sum(len(generation.tokens) for _, generation in decoder.generate(rows))


def main() -> None:
    params, workspace = load_params(), Workspace()
    device = resolve_device(params.decoding.device)
    dtype = resolve_dtype(params.base.dtype, device)
    model = load_model(workspace.models / "base", dtype, device)
    prompter = Prompter.load(workspace.models / "base", params.base.template)
    arms = {name: workspace.adapter(name) for name in params.objectives}
    decoder = GuidedDecoder(model, prompter, arms)
    prompts = [row["prompt"] for _, row in read_jsonl(workspace.results / "prepare" / "prompts.jsonl")]
    lines = []
    for batch in (1, 8, 32):
        chosen = prompts[:batch]
        runs = {("unguided generate", 0): lambda: unguided(model, prompter, chosen)}  # noqa: B023 (called at once)
        for k in range(len(arms) + 1):
            runs["guided", k] = lambda names=list(arms)[:k]: guided(decoder, names, chosen)  # noqa: B023
        rates: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
        for repetition in range(REPETITIONS + 1):
            for key, run in runs.items():
                started = time.perf_counter()
                tokens = run()
                if repetition:  # the first is a warm-up
                    rates[key].append(tokens / (time.perf_counter() - started))
        floor = rates["unguided generate", 0]
        for (method, k), found in rates.items():
            ratio = statistics.median(rate / base for rate, base in zip(found, floor, strict=True))
            lines.append(
                {
                    "method": method,
                    "k": k,
                    "batch": batch,
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens_per_s": round(statistics.median(found), 1),
                    "ratio_to_unguided": round(ratio, 3),
                    "low": round(min(found), 1),
                    "high": round(max(found), 1),
                }
            )
    table = pd.DataFrame(lines)
    with replacing(Path("results/bench/decoding.csv")) as stream:
        table.to_csv(stream, index=False)
    Console().print(table.to_string(index=False))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
