"""What judges say of responses: scores, verdicts kept for good, the judge's own card, and win rates.

A pointwise judge scores a response; a pairwise one compares it with the control's to the same prompt, and its score is
1 where it is better, 0 where the control is, 1/2 where they are equal, and none where the verdict is undetermined.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from pipeline.config.errors import UserError
from pipeline.config.schema import Judge, LlmJudge, LocalJudge, Objective, OracleJudge, Params, RewardJudge
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row, digest
from pipeline.data.oracles import scorer
from pipeline.data.row_store import RowStore
from pipeline.evaluation.front import bootstrap_mean
from pipeline.evaluation.judges.reward_model import RewardModelJudge
from pipeline.evaluation.judges.verdicts import Pair, Verdicts
from pipeline.evaluation.statistics import share


def score_rows(rows: Sequence[Row], objectives: Mapping[str, Objective]) -> list[Row]:
    """The rows with one score per objective by its own scorer, under the objective's name.

    Raises:
        UserError: an objective has no scorer.
    """
    scorers = _scorers(objectives)
    return [_scored(row, {name: score(row["response"]) for name, score in scorers.items()}) for row in rows]


def _scorers(objectives: Mapping[str, Objective]) -> dict[str, Callable[[str], float]]:
    scorers = {}
    for name, objective in objectives.items():
        if objective.scorer is None:
            raise UserError(f"objectives.{name} has no scorer, which judge=oracle needs: set objectives.{name}.scorer.")
        scorers[name] = scorer(objective.scorer)
    return scorers


def check_judge(params: Params, workspace: Workspace) -> None:
    """Refuse, before anything is generated for it, a judge that lacks what it needs.

    Raises:
        UserError: an objective has no scorer, reward model or rubric, or the judge has no key.
    """
    judge = params.judge
    if isinstance(judge, OracleJudge):
        _scorers(params.objectives)
    elif isinstance(judge, RewardJudge):
        RewardModelJudge(judge, params, workspace)
        for name in params.objectives:
            spec = judge.models[name]
            if spec.source == "path" and not Path(spec.location).is_dir():
                raise UserError(
                    f"judge.models.{name}: there is no folder {spec.location}: train it, or correct the path."
                )
    else:
        for name in params.objectives:
            Verdicts(judge, params, workspace, name)


def responses_of(rows: Sequence[Row], point: str) -> dict[tuple[str, int], str]:
    """The responses at a point by prompt and sample, for `judge_rows` to compare others with."""
    return {(row["prompt"], row["sample"]): row["response"] for row in rows if row["point"] == point}


def judge_rows(
    rows: Sequence[Row], params: Params, workspace: Workspace, control: Mapping[tuple[str, int], str]
) -> list[Row]:
    """The rows with the configured judge's score per objective; None where a verdict is undetermined.

    Args:
        rows: each with `prompt`, `response`, and for a pairwise judge `sample`.
        params: the experiment.
        workspace: where models and stores are.
        control: what a pairwise judge compares a response with, by prompt and sample; where the texts are equal it is
            not asked, and the score is 1/2.

    Raises:
        UserError: the judge lacks what it needs, or stopped; verdicts so far are kept.
    """
    judge = params.judge
    if isinstance(judge, OracleJudge):
        return score_rows(rows, params.objectives)
    if isinstance(judge, RewardJudge):
        found = {name: _rewards(name, rows, judge, params, workspace) for name in params.objectives}
        return [
            _scored(row, {name: rewards[place] for name, rewards in found.items()}) for place, row in enumerate(rows)
        ]
    pairs = [(row["prompt"], row["response"], control[row["prompt"], row["sample"]]) for row in rows]
    differing = list(dict.fromkeys(pair for pair in pairs if pair[1] != pair[2]))
    verdicts = {}
    for name in params.objectives:
        given = Verdicts(judge, params, workspace, name).of(differing)
        verdicts[name] = dict(zip(differing, map(_score, given), strict=True))
    return [
        _scored(row, {name: scores.get(pair, 0.5) for name, scores in verdicts.items()})
        for row, pair in zip(rows, pairs, strict=True)
    ]


def scored_frame(rows: Iterable[Row], objectives: Iterable[str], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Judged rows, of their columns all or these and the scores, which are numbers, NaN where there is none."""
    if columns is None:
        frame = pd.DataFrame(list(rows))
    else:
        names = [*columns, *objectives]
        frame = pd.DataFrame(([row[name] for name in names] for row in rows), columns=names)
    return frame.astype(dict.fromkeys(objectives, float))


def without_tokens(row: Row) -> Row:
    """The row without its token ids, which are most of it and of no use to an evaluation."""
    return {name: value for name, value in row.items() if name != "tokens"}


def _scored(row: Row, scores: Row) -> Row:
    return without_tokens(row) | scores


def judge_card(pairs: Mapping[str, Sequence[Row]], params: Params, workspace: Workspace) -> Row:
    """How far the judge agrees with held-out labels, for every objective.

    Per objective: `accuracy` with its interval over the prompts of pairs with a verdict (a tie agrees with no label),
    `undetermined` and `ties` as shares of the pairs asked, and of a judge that saw both orders `position_bias`, the
    share of pairs whose verdict went with the place of a response and not with the response.

    Args:
        pairs: per objective, labelled pairs that nothing was trained on; `judge.card_pairs` of them are drawn by a
            hash, so that another number or further pairs leave those that are drawn already.
        params: the experiment.
        workspace: where models and stores are.
    """
    judge, card = params.judge, {}
    for name, labelled in pairs.items():
        taken = sorted(labelled, key=lambda pair: _lot(pair, params.seed))[: judge.card_pairs]
        given = list(_agreement(taken, name, params, workspace))
        scores = [_score(one) for one in given]
        decided = [
            (pair["prompt"], score > 0.5) for pair, score in zip(taken, scores, strict=True) if score is not None
        ]
        prompts, right = [prompt for prompt, _ in decided], [agrees for _, agrees in decided]
        told = share(right, prompts, judge.confidence, judge.resamples, params.seed)
        turned = [one for one in given if len(one) == 2 and None not in one]
        card[name] = {
            "accuracy": asdict(told),
            "ties": _rate(score == 0.5 for score in scores),
            "undetermined": _rate(score is None for score in scores),
            "position_bias": _rate(one[0] != one[1] and 0.5 not in one for one in turned) if turned else None,
        }
    return {"kind": judge.kind, "objectives": card}


def _lot(pair: Row, seed: int) -> str:
    return digest([seed, pair["prompt"], pair["chosen"], pair["rejected"]])


def _agreement(
    pairs: Sequence[Row], name: str, params: Params, workspace: Workspace
) -> Iterator[tuple[float | None, ...]]:
    """For each pair, the verdicts on the chosen response."""
    judge = params.judge
    if isinstance(judge, LlmJudge | LocalJudge):
        asked: list[Pair] = [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]
        yield from Verdicts(judge, params, workspace, name).of(asked)
        return
    rows = [
        {"prompt": pair["prompt"], "response": pair[side], "finish": finish}
        for pair in pairs
        for side in ("chosen", "rejected")
        for finish in ["eos" if pair.get(f"{side}_ended", True) else "length"]
    ]
    if isinstance(judge, RewardJudge):
        scores = _rewards(name, rows, judge, params, workspace)
    else:
        scores = [row[name] for row in score_rows(rows, {name: params.objectives[name]})]
    for chosen, rejected in zip(scores[::2], scores[1::2], strict=True):
        yield (0.5 * (1 + (chosen > rejected) - (chosen < rejected)),)


def _rewards(name: str, rows: Sequence[Row], judge: RewardJudge, params: Params, workspace: Workspace) -> list[float]:
    """Rewards of an objective's model, from the store where they are there."""
    model = RewardModelJudge(judge, params, workspace)
    origin = model.identity(name)
    keys = [digest([origin, row["prompt"], row["response"], row.get("finish") == "length"]) for row in rows]
    store = RowStore(workspace.scratch / "store" / "rewards.jsonl", keys)
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in store}
    if missing:
        scores = model.score(name, list(missing.values()))
        store.add((key, {"reward": score}) for key, score in zip(missing, scores, strict=True))
    return [store[key]["reward"] for key in keys]


def _score(given: Sequence[float | None]) -> float | None:
    """The mean of the verdicts that were given."""
    known = [one for one in given if one is not None]
    return sum(known) / len(known) if known else None


def _rate(true: Iterable[bool]) -> float:
    listed = list(true)
    return sum(listed) / max(1, len(listed))


def win_rates(scored: pd.DataFrame, control: str, objectives: Sequence[str], judge: Judge, seed: int) -> pd.DataFrame:
    """Win rate of every point against the control, prompt by prompt and sample by sample; a tie is half a win.

    Args:
        scored: one row per response: `point`, `prompt`, `sample`, and a score per objective.

    Returns:
        `point, objective, win_rate, ci_low, ci_high, ties, undetermined, prompts`; intervals resample prompts, and
        undetermined verdicts are left out of everything but their count.
    """
    keys = ["prompt", "sample"]
    against = scored[scored.point == control].set_index(keys)
    lines = []
    for point, mine in scored.groupby("point", sort=False):
        paired = mine.set_index(keys).join(against, rsuffix="_control", how="inner", validate="one_to_one")
        for name in objectives:
            compared = paired[name] - paired[f"{name}_control"]
            difference = compared.dropna()
            won = (difference > 0) + 0.5 * (difference == 0)
            by_prompt = won.groupby("prompt").mean().to_numpy()
            mean, low, high = bootstrap_mean(by_prompt, judge.confidence, judge.resamples, seed)
            ties, undetermined = int((difference == 0).sum()), len(compared) - len(difference)
            lines.append((point, name, mean, low, high, ties, undetermined, len(by_prompt)))
    return pd.DataFrame(
        lines, columns=["point", "objective", "win_rate", "ci_low", "ci_high", "ties", "undetermined", "prompts"]
    )  # fmt: skip
