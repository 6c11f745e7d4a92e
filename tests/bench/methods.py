"""Speed of every compared method, and of guidance on every base of the ladder, at batch 8.

    python -m tests.bench.methods     # after `dvc repro` with experiment=comparison or weak_to_strong in params.yaml

Tokens per second, prompts included: medians of interleaved repetitions; the first of each warms up. Results go to
results/bench/methods.csv, or to ladder.csv beside it where the experiment has a ladder of bases.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import pandas as pd

from pipeline.config.load import load_params
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl, replacing
from pipeline.decoding.request import Request
from pipeline.evaluation.standings import UNGUIDED
from pipeline.generation.comparison import entries_of
from pipeline.generation.methods.compared_method import ComparedMethod
from pipeline.generation.model_set import Decoder, ModelSet
from pipeline.generation.rows import point_requests

OUT = Path("results/bench")
ROWS, REPETITIONS, TOKENS = 8, 3, 24
Run = tuple[Decoder, list[Request]]


def tokens_per_second(runs: dict[str, Run]) -> dict[str, float]:
    """The speed of each run; all take turns, so that what else the machine does falls on all."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(REPETITIONS + 1):
        for name, (decoder, requests) in runs.items():
            started = time.perf_counter()
            tokens = sum(len(generation.tokens) for _, generation in decoder.generate(requests))
            if repetition:
                speeds[name].append(tokens / (time.perf_counter() - started))
    return {name: median(measured) for name, measured in speeds.items()}


def methods(params: Params, workspace: Workspace, prompts: Sequence[str]) -> list[dict]:
    """Every method at its most mixed point."""
    unguided = ModelSet(params, workspace, params.base, ()).decoder(params.decoding.device, ROWS)
    plain = [Request(prompt, max_new_tokens=TOKENS, seed=params.seed) for prompt in prompts]
    runs: dict[str, Run] = {UNGUIDED: (unguided, plain)}
    for name, method in params.comparison.methods.items():
        mixes = [line.mix for line in entries_of(params) if line.method == name and line.front and line.mix]
        mix = max(mixes, key=lambda mix: min(mix.shares.values()) if len(mix.shares) > 1 else 0.0)
        compared = ComparedMethod(method, params, workspace, params.base, [mix])
        runs[name] = compared.decoder(ROWS), [compared.request(mix, prompt, 0) for prompt in prompts]
    speeds = tokens_per_second(runs)
    return [{"method": name, "tokens_per_s": round(speed, 1)} for name, speed in speeds.items()]


def ladder(params: Params, workspace: Workspace, prompts: Sequence[str]) -> list[dict]:
    """Every point of the sweep on every base; a best-of-N row costs N rows of the control."""
    lines = []
    for base in params.weak_to_strong.bases:
        requests = list(point_requests(params, base, prompts))
        used = {name for _, request in requests for name in request.arms}
        decoder = ModelSet(params, workspace, base, used).decoder(params.decoding.device, ROWS)
        of_point: dict[str, Run] = {}
        for point, request in requests:
            of_point.setdefault(point, (decoder, []))[1].append(request)
        speeds = tokens_per_second(of_point)
        lines += [{"base": base, "point": point, "tokens_per_s": round(speed, 1)} for point, speed in speeds.items()]
    return lines


def main() -> None:
    params, workspace = load_params(), Workspace()
    params = replace(params, decoding=replace(params.decoding, max_new_tokens=TOKENS, samples_per_prompt=1, stop=()))
    prompts = [row["prompt"] for _, row in read_jsonl(workspace.results / "prepare" / "prompts.jsonl")][:ROWS]
    name, lines = ("ladder", ladder) if params.weak_to_strong.bases else ("methods", methods)
    table = pd.DataFrame(lines(params, workspace, prompts))
    with replacing(OUT / f"{name}.csv") as stream:
        table.to_csv(stream, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
