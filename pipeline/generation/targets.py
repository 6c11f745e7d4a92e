"""The weights that bring an outcome, searched for on validation prompts: measure, predict, measure what looks best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.config.errors import UserError
from pipeline.config.schema import Params, Point, Sweep
from pipeline.config.workspace import Workspace
from pipeline.data.files import read_jsonl
from pipeline.evaluation.judges.session import JudgeSession
from pipeline.evaluation.judging import judge_rows, responses_of, scored_frame
from pipeline.evaluation.statistics import Bootstrap
from pipeline.evaluation.targets import Surface, Target, candidates
from pipeline.generation.rows import generate_sweep, prompts_with_room

_NEAR = 0.03  # distance of weights below which another point would tell nothing new
_BEYOND = 1.5  # times the largest sum of weights in the sweep, up to which weights are considered


@dataclass(frozen=True)
class Choice:
    """Weights, and what they promise on average over prompts."""

    weights: Mapping[str, float]
    rewards: Mapping[str, tuple[float, float, float]]  # by objective: mean and interval
    kl: tuple[float, float, float]  # nats per response, likewise
    shortfall: float  # above 0: the target is out of reach, and this is the nearest
    measured: int  # weight vectors


def validation_prompts(workspace: Workspace, objectives: Sequence[str]) -> list[str]:
    """The prompts of the pairs that training was watched on: neither trained on, nor those of the results.

    Raises:
        UserError: there is none.
    """
    files = [workspace.results / "prepare" / "pairs" / f"{name}.jsonl" for name in objectives]
    rows = (row for file in files for _, row in read_jsonl(file))
    prompts = list(dict.fromkeys(row["prompt"] for row in rows if row["split"] == "validation"))
    if not prompts:
        raise UserError("no pair is of a validation prompt: set data.validation_fraction, or files.validation.")
    return prompts


class TargetSearch:
    """Weight vectors measured so far, and what they say of others.

    Args:
        params: the experiment; a pairwise judge compares with its `sweep.control`.
        workspace: where models, pairs and stores are.
        judge: of the experiment.
        samples: responses to each prompt.
        form: of guidance, `plain` or `log_ratio`.

    Raises:
        UserError: fewer than one sample, no validation prompt, or none that leaves room for a response.
    """

    def __init__(
        self, params: Params, workspace: Workspace, judge: JudgeSession, samples: int = 2, form: str = "plain"
    ) -> None:
        if samples < 1:
            raise UserError(f"{samples} responses to a prompt measure nothing: ask for 1 or more.")
        self._params = replace(params, decoding=replace(params.decoding, samples_per_prompt=samples))
        self._workspace, self._judge, self._form = workspace, judge, form
        self.objectives = list(params.objectives)
        prompts = validation_prompts(workspace, self.objectives)
        self.prompts = prompts_with_room(params, workspace, [params.base], prompts)
        guided = [point for point in params.sweep.points.values() if point.guided and point.form in ("plain", form)]
        largest = max((sum(map(abs, point.weights.values())) for point in guided), default=1.0)
        self.most = _BEYOND * largest
        # By weights, and then by prompt those with all verdicts.
        self._measures: dict[tuple[float, ...], dict[str, np.ndarray]] = {}
        # Each objective alone as well: points of a sweep may lie on one line, through which there are many surfaces.
        begin = [*(point.weights for point in guided), *({name: largest} for name in self.objectives)]
        self._begin = [
            tuple(scale * weights.get(name, 0.0) for name in self.objectives)
            for weights in begin
            for scale in (1.0, 0.5)
        ]  # fmt: skip

    def measure(self, vectors: Sequence[tuple[float, ...]]) -> None:
        """Generate and judge the validation prompts at weight vectors; stored rows and verdicts are not made twice."""
        new = [vector for vector in dict.fromkeys(vectors) if vector not in self._measures]
        if not new:
            return
        control = self._params.sweep.control
        points = {control: self._params.sweep.points[control]} | {
            f"at {place}": Point(dict(zip(self.objectives, vector, strict=True)), form=self._form)  # type: ignore[arg-type]
            for place, vector in enumerate(new)
        }
        params = replace(self._params, sweep=Sweep(control, points))
        rows = generate_sweep(params, self._workspace, params.base, self.prompts)
        compared = responses_of(rows, control)
        self._judge.prepare({}, [(rows, compared)])
        frame = scored_frame(judge_rows(rows, self._judge, compared), self.objectives)
        for place, vector in enumerate(new):
            of_point = frame[frame.point == f"at {place}"].groupby("prompt")[[*self.objectives, "kl"]].mean().dropna()
            self._measures[vector] = {prompt: of_point.loc[prompt].to_numpy() for prompt in of_point.index}

    def surface(self) -> Surface:
        """What has been measured, on the prompts that have a verdict everywhere.

        Raises:
            UserError: no prompt has.
        """
        everywhere = set.intersection(*(set(of_prompt) for of_prompt in self._measures.values()))
        prompts = [prompt for prompt in self.prompts if prompt in everywhere]
        if not prompts:
            raise UserError("the judge left something undetermined on every prompt: no weights can be chosen by it.")
        measures_PNK = np.array([[by_prompt[prompt] for by_prompt in self._measures.values()] for prompt in prompts])
        bootstrap = Bootstrap.of(self._params.judge, self._params.seed)
        return Surface(np.array(list(self._measures)), measures_PNK, bootstrap)

    def choose(self, target: Target, points: int = 6) -> Choice:
        """The weights for a target.

        Where a prediction looks best is measured next, until that is where something was measured already.

        Args:
            target: what is asked for.
            points: weight vectors to measure at most, beside those that a search begins with.

        Raises:
            UserError: the target names something that there is not; the judge stopped.
        """
        target.check(self.objectives)
        self.measure([(0.0,) * len(self.objectives), *self._begin])
        offered_CM = candidates(self.most, len(self.objectives)).round(3)
        for _ in range(points):
            surface = self.surface()
            best_M = offered_CM[target.best(surface.predicted(offered_CM), self.objectives)]
            if np.linalg.norm(surface.weights_NM - best_M, axis=1).min() < _NEAR * self.most:
                break
            self.measure([tuple(map(float, best_M))])
        surface = self.surface()
        predicted_CK = surface.predicted(offered_CM)
        place = target.best(predicted_CK, self.objectives)
        bounds_2K = surface.interval(offered_CM[place])
        promises = [
            (float(mean), *map(float, bounds)) for mean, bounds in zip(predicted_CK[place], bounds_2K.T, strict=True)
        ]
        return Choice(
            {name: float(weight) for name, weight in zip(self.objectives, offered_CM[place], strict=True)},
            dict(zip(self.objectives, promises[:-1], strict=True)),  # type: ignore[arg-type]
            promises[-1],  # type: ignore[arg-type]
            float(target.shortfall(predicted_CK[[place]], self.objectives)[0]),
            len(self._measures),
        )  # fmt: skip
