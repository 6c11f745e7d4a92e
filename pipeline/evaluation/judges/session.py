"""One judge for a whole run: checked when it is opened, with one budget for all it is asked.

Pointwise judges give every response a score. Pairwise ones compare a response with the control's to the same prompt,
and its score is 1 where it is better, 0 where the control is, 1/2 where they are equal or one text, and none where the
verdict is undetermined.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.config.errors import UserError
from pipeline.config.judges import Judge, LlmJudge, LocalJudge, OracleJudge, RewardJudge
from pipeline.config.schema import Objective
from pipeline.data.files import Row
from pipeline.data.oracles import scorer
from pipeline.data.responses import GeneratedRow, Response
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.judges.verdicts import Verdict, Verdicts, mean_score, reasons_text, undetermined
from pipeline.evaluation.text_classifier import TextClassifier

if TYPE_CHECKING:
    from pipeline.evaluation.judges.reward_model import Reward, RewardModels

Control = Mapping[tuple[str, int], str]  # responses by prompt and sample
Labelled = Mapping[str, Sequence[Row]]  # per objective, pairs of a chosen and a rejected response


class JudgeSession(Protocol):
    """What all judges do."""

    def prepare(self, labelled: Labelled, rows: Sequence[tuple[Sequence[GeneratedRow], Control]]) -> None:
        """Get ready for `verdicts` on these pairs and `scores` of all of these rows.

        Reward models score all at once, so that each is loaded once; for judges that read, it is printed how much they
        will be asked.
        """

    def verdicts(self, labelled: Labelled) -> dict[str, list[tuple[Verdict, ...]]]:
        """For each labelled pair, the verdicts on the chosen response, one per order in which it was asked.

        Raises:
            UserError: the judge stopped; what it said so far is kept.
        """

    def scores(self, rows: Sequence[GeneratedRow], control: Control) -> dict[str, list[float | None]]:
        """Per objective the score of every row; None where the verdict is undetermined.

        Raises:
            UserError: the judge stopped, or gave no verdict at all; what it said so far is kept.
        """

    def truncated(self, labelled: Labelled) -> dict[str, float | None]:
        """Per objective the share of these texts that were read without their beginning; None: it reads none so."""


def open_judge(judge: Judge, objectives: Mapping[str, Objective], resources: Resources) -> JudgeSession:
    """The configured judge.

    Args:
        judge: its configuration.
        objectives: what it judges by.
        resources: what it finds on this machine.

    Raises:
        UserError: an objective has no scorer, reward model or rubric, a folder lacks something, or there is no key.
    """
    names = list(objectives)
    match judge:
        case OracleJudge():
            return _Oracle(objectives, resources.workspace.classifiers)
        case RewardJudge():
            from pipeline.evaluation.judges.reward_model import RewardModels  # seconds to import: torch, transformers

            return _RewardModel(RewardModels(judge, names, resources), names)
        case LlmJudge() | LocalJudge():
            return _Pairwise(Verdicts(judge, names, resources), names)


class _Oracle:
    """Every objective's own scorer; of two sentences without one, the classifier that prepare fitted.

    That classifier says the probability that a text was written to the wanted sentence.
    """

    def __init__(self, objectives: Mapping[str, Objective], classifiers: Path) -> None:
        self._scorers: dict[str, Callable[[str], float]] = {}
        for name, objective in objectives.items():
            if objective.scorer is not None:
                self._scorers[name] = scorer(objective.scorer)
            elif objective.wanted is not None:
                self._scorers[name] = _classifier(name, classifiers).probability
            else:
                raise UserError(
                    f"objectives.{name} has no scorer, which judge=oracle needs: set objectives.{name}.scorer."
                )

    def prepare(self, labelled: Labelled, rows: Sequence[tuple[Sequence[GeneratedRow], Control]]) -> None:
        pass

    def verdicts(self, labelled: Labelled) -> dict[str, list[tuple[Verdict, ...]]]:
        return {
            name: _compared([self._scorers[name](text.response) for text in _texts(pairs)])
            for name, pairs in labelled.items()
        }

    def scores(self, rows: Sequence[GeneratedRow], control: Control) -> dict[str, list[float | None]]:
        return {name: [score(row.response) for row in rows] for name, score in self._scorers.items()}

    def truncated(self, labelled: Labelled) -> dict[str, float | None]:
        return dict.fromkeys(labelled)


def _classifier(name: str, file: Path) -> TextClassifier:
    fitted = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if name not in fitted:
        raise UserError(f"{file} has no classifier for {name}: run stage prepare again, which fits it.")
    return TextClassifier.from_json(fitted[name])


class _RewardModel:
    """A reward model for each objective."""

    def __init__(self, models: RewardModels, objectives: Sequence[str]) -> None:
        self._models, self._objectives = models, objectives

    def prepare(self, labelled: Labelled, rows: Sequence[tuple[Sequence[GeneratedRow], Control]]) -> None:
        every = [row for group, _ in rows for row in group]
        self._models.of({name: [*_texts(labelled.get(name, ())), *every] for name in self._objectives})

    def verdicts(self, labelled: Labelled) -> dict[str, list[tuple[Verdict, ...]]]:
        return {name: _compared([one.value for one in rewards]) for name, rewards in self._of(labelled).items()}

    def scores(self, rows: Sequence[GeneratedRow], control: Control) -> dict[str, list[float | None]]:
        rewards = self._models.of(dict.fromkeys(self._objectives, rows))
        for name, of_objective in rewards.items():
            if cut := sum(one.truncated for one in of_objective):
                print(
                    f"judge: {name}: {cut} of {len(rows)} texts exceed the reward model's context and were read "
                    "without their beginning"
                )
        return {name: [one.value for one in of_objective] for name, of_objective in rewards.items()}

    def truncated(self, labelled: Labelled) -> dict[str, float | None]:
        return {
            name: sum(one.truncated for one in rewards) / max(1, len(rewards))
            for name, rewards in self._of(labelled).items()
        }

    def _of(self, labelled: Labelled) -> dict[str, list[Reward]]:
        return self._models.of({name: _texts(pairs) for name, pairs in labelled.items()})


class _Pairwise:
    """Whoever reads a rubric and two responses."""

    def __init__(self, verdicts: Verdicts, objectives: Sequence[str]) -> None:
        self._verdicts, self._objectives = verdicts, objectives

    def prepare(self, labelled: Labelled, rows: Sequence[tuple[Sequence[GeneratedRow], Control]]) -> None:
        groups = [dict.fromkeys(self._objectives, _differing(*group)) for group in rows]
        print(f"judge: {self._verdicts.outlook([_chosen_first(labelled), *groups])}")

    def verdicts(self, labelled: Labelled) -> dict[str, list[tuple[Verdict, ...]]]:
        return self._verdicts.of(_chosen_first(labelled))

    def scores(self, rows: Sequence[GeneratedRow], control: Control) -> dict[str, list[float | None]]:
        differing = _differing(rows, control)
        scores: dict[str, list[float | None]] = {}
        for name, verdicts in self._verdicts.of(dict.fromkeys(self._objectives, differing)).items():
            count = sum(map(len, verdicts))
            if reasons := undetermined(verdicts):
                shown = f"{sum(reasons.values())} of {count} verdicts on {name} are undetermined: "
                if sum(reasons.values()) == count:
                    raise UserError(f"{shown}{reasons_text(reasons)}; {HINT}.")
                print(f"judge: {shown}{reasons_text(reasons)}")
            of_pair = dict(zip(differing, map(mean_score, verdicts), strict=True))
            scores[name] = [of_pair.get(_pair(row, control), 0.5) for row in rows]
        return scores

    def truncated(self, labelled: Labelled) -> dict[str, float | None]:
        return dict.fromkeys(labelled)


# What to do where a judge never gives a verdict.
HINT = (
    "raise judge.max_tokens where finish_reason is length, else choose another judge.model; what it replied is in the "
    "row store verdicts.jsonl"
)


def _pair(row: GeneratedRow, control: Control) -> tuple[str, str, str]:
    return row.prompt, row.response, control[row.prompt, row.sample]


def _differing(rows: Sequence[GeneratedRow], control: Control) -> list[tuple[str, str, str]]:
    """The pairs of a row's text and another, each once."""
    pairs = (_pair(row, control) for row in rows)
    return list(dict.fromkeys(pair for pair in pairs if pair[1] != pair[2]))


def _chosen_first(labelled: Labelled) -> dict[str, list[tuple[str, str, str]]]:
    return {
        name: [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs] for name, pairs in labelled.items()
    }


def _texts(pairs: Sequence[Row]) -> list[Response]:
    """Both texts of every pair."""
    return [
        Response(prompt=pair["prompt"], response=pair[side], finish=finish)
        for pair in pairs
        for side in ("chosen", "rejected")
        for finish in ["eos" if pair.get(f"{side}_ended", True) else "length"]
    ]


def _compared(values: Sequence[float]) -> list[tuple[Verdict, ...]]:
    """Verdicts from the scores of both texts of every pair."""
    return [
        (Verdict(0.5 * (1 + (chosen > rejected) - (chosen < rejected))),)
        for chosen, rejected in zip(values[::2], values[1::2], strict=True)
    ]
