"""Weak to strong: one small ARM on bases of several sizes, and how much of what tuning each would give it recovers.

Shapes: P prompts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.responses import GeneratedRow
from pipeline.evaluation.judges.session import Control, JudgeSession
from pipeline.evaluation.judging import judge_rows, responses_of
from pipeline.evaluation.standings import entries
from pipeline.evaluation.statistics import best_of_kl
from pipeline.generation.methods.compared_method import ComparedMethod
from pipeline.generation.rows import generate_stored, generate_sweep, point_requests


@dataclass(frozen=True)
class Sampled:
    """What was generated on one base, not judged yet."""

    rows: list[GeneratedRow]  # every point of the sweep, and of each method
    pool: list[GeneratedRow]  # samples of the control for best-of-N, `best_of` of each prompt and sample
    control: Control  # what a pairwise judge compares both with, by prompt and sample

    @property
    def every(self) -> list[GeneratedRow]:
        """All rows that a judge is to score."""
        return [*self.rows, *self.pool]


def sample(params: Params, workspace: Workspace, base: str, prompts: Sequence[str]) -> Sampled:
    """Every point of the sweep on a base, and for each sample of the control N more to choose the best from."""
    rows = [*generate_sweep(params, workspace, base, prompts), *_of_methods(params, workspace, base, prompts)]
    own, times = params.decoding.samples_per_prompt, params.weak_to_strong.best_of
    control = {params.sweep.control: params.sweep.points[params.sweep.control]}
    many = replace(
        params,
        decoding=replace(params.decoding, samples_per_prompt=own * times),
        sweep=replace(params.sweep, points=control),
    )
    requests = [request for _, request in point_requests(many, base, prompts)]
    pool = generate_stored(requests, params, workspace, base, "generate")
    plain = responses_of(rows, params.sweep.control).items()
    compared = {(prompt, number + own * time): text for (prompt, number), text in plain for time in range(times)}
    return Sampled(rows, pool, compared)


def _of_methods(params: Params, workspace: Workspace, base: str, prompts: Sequence[str]) -> list[GeneratedRow]:
    """What the methods of the ladder make of a base at the guided points of the sweep."""
    rows: list[GeneratedRow] = []
    for entry in entries(params.weak_to_strong.methods, params.sweep.points):
        if entry.mix:
            print(f"weak_to_strong: {entry.name} on {base}")
            method = params.weak_to_strong.methods[entry.method]
            compared = ComparedMethod(method, params, workspace, base, [entry.mix])
            requests = [
                (entry.mix, compared.request(entry.mix, prompt, sample))
                for prompt in prompts[: method.prompts]
                for sample in range(params.decoding.samples_per_prompt)
            ]
            rows += [replace(row, point=entry.name) for row in compared.rows(requests)]
    return rows


def judge_bases(params: Params, sampled: Mapping[str, Sampled], judge: JudgeSession) -> list[GeneratedRow]:
    """All rows with the judge's scores and their `base`: every point of the sweep, and the best of N samples.

    Each of the `samples_per_prompt` best-of-N rows has N samples of its own. Its KL is bounded as in `best_of_kl`.
    """
    judge.prepare({}, [(samples.every, samples.control) for samples in sampled.values()])
    return [
        replace(row, base=base)
        for base, samples in sampled.items()
        for row in _with_best(params, judge_rows(samples.every, judge, samples.control), len(samples.rows))
    ]


def _with_best(params: Params, judged: Sequence[GeneratedRow], swept: int) -> list[GeneratedRow]:
    """The judged rows of the sweep, which are the first, and the best of those behind them."""
    scored, pool = list(judged[:swept]), judged[swept:]
    own, times = params.decoding.samples_per_prompt, params.weak_to_strong.best_of
    for start in range(0, len(pool), own * times):
        of_prompt = pool[start : start + own * times]
        for number in range(own):
            for name in params.objectives:
                chosen = max(of_prompt[number::own], key=lambda row: _known(row.scores[name]))
                kl = best_of_kl(times, chosen.logp, chosen.logp_base)
                scored.append(replace(chosen, point=f"best_of_{times}/{name}", sample=number, kl=kl))
    return scored


def _known(score: float | None) -> float:
    return -math.inf if score is None else score
