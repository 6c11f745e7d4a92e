"""Weak to strong: one small ARM on bases of several sizes, and how much of what tuning each would give it recovers.

Shapes: P prompts.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row
from pipeline.evaluation.judging import judge_rows, responses_of
from pipeline.evaluation.statistics import best_of_kl
from pipeline.generation.model_set import ModelSet
from pipeline.generation.rows import generate_stored, generate_sweep, point_requests

_TIMED_ROWS, _REPETITIONS, _TIMED_TOKENS = 8, 3, 24


def generate(params: Params, workspace: Workspace, base: str, prompts: Sequence[str]) -> list[Row]:
    """All rows of a base with the judge's scores: every point of the sweep, and the best of N samples of the control.

    Each of the `samples_per_prompt` best-of-N rows has N samples of its own. Its KL is bounded as in `best_of_kl`.
    """
    rows = generate_sweep(params, workspace, base, prompts)
    own, times = params.decoding.samples_per_prompt, params.weak_to_strong.best_of
    control = {params.sweep.control: params.sweep.points[params.sweep.control]}
    many = replace(
        params,
        decoding=replace(params.decoding, samples_per_prompt=own * times),
        sweep=replace(params.sweep, points=control),
    )
    wanted = [request for _, request in point_requests(many, base, prompts)]
    pool = generate_stored(wanted, params, workspace, base, "generate")
    plain = responses_of(rows, params.sweep.control).items()
    compared = {(prompt, sample + own * time): text for (prompt, sample), text in plain for time in range(times)}
    judged = judge_rows([*rows, *pool], params, workspace, compared)
    scored, pool = judged[: len(rows)], judged[len(rows) :]
    best = f"best_of_{times}"
    for start in range(0, len(pool), own * times):
        of_prompt = pool[start : start + own * times]
        for sample in range(own):
            for name in params.objectives:
                chosen = max(of_prompt[sample::own], key=lambda row: -math.inf if row[name] is None else row[name])
                kl = best_of_kl(times, chosen["logp"], chosen["logp_base"])
                scored.append({**chosen, "point": f"{best}/{name}", "sample": sample, "kl": kl})
    return [{"base": base, **row} for row in scored]


def tokens_per_second(params: Params, workspace: Workspace, base: str, prompts: Sequence[str]) -> dict[str, float]:
    """Speed of every point at batch 8, prompts included: medians of interleaved repetitions, by point."""
    timed = replace(
        params, decoding=replace(params.decoding, max_new_tokens=_TIMED_TOKENS, samples_per_prompt=1, stop=())
    )
    requests = list(point_requests(timed, base, [*prompts[:_TIMED_ROWS]]))
    used = {name for _, request in requests for name in request.arms}
    decoder = ModelSet(params, workspace, base, used).decoder(params.decoding.device, _TIMED_ROWS)
    speeds: dict[str, list[float]] = {point: [] for point, _ in requests}
    for repetition in range(_REPETITIONS + 1):
        for point, measured in speeds.items():
            mine = [request for name, request in requests if name == point]
            started = time.perf_counter()
            tokens = sum(len(generation.tokens) for _, generation in decoder.generate(mine))
            if repetition:  # the first warms up
                measured.append(tokens / (time.perf_counter() - started))
    return {point: median(measured) for point, measured in speeds.items()}
