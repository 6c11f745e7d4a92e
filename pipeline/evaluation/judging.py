"""What a judge says of responses: scores of rows, the judge's own card, and win rates."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

import pandas as pd

from pipeline.config.errors import UserError
from pipeline.data.files import Row, digest
from pipeline.data.responses import GeneratedRow
from pipeline.evaluation.judges.session import HINT, Control, JudgeSession, Labelled
from pipeline.evaluation.judges.verdicts import mean_score, reasons_text, undetermined
from pipeline.evaluation.statistics import Bootstrap, bootstrap_mean, share


def responses_of(rows: Sequence[GeneratedRow], point: str) -> dict[tuple[str, int], str]:
    """The responses at a point by prompt and sample, for `judge_rows` to compare others with."""
    return {(row.prompt, row.sample): row.response for row in rows if row.point == point}


def judge_rows(rows: Sequence[GeneratedRow], judge: JudgeSession, control: Control) -> list[GeneratedRow]:
    """The rows with the judge's score per objective, and without their tokens, which no evaluation needs.

    Args:
        rows: what is judged.
        judge: of the run.
        control: what a pairwise judge compares a response with, by prompt and sample; where the texts are equal it is
            not asked, and the score is 1/2.

    Raises:
        UserError: the judge stopped, or gave no verdict at all on an objective; verdicts so far are kept.
    """
    scores = judge.scores(rows, control)
    return [
        replace(row, tokens=(), scores={name: of_objective[place] for name, of_objective in scores.items()})
        for place, row in enumerate(rows)
    ]


def scored_frame(
    rows: Iterable[GeneratedRow], objectives: Iterable[str], columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Judged rows, of their columns all or these and the scores, which are numbers, NaN where there is none."""
    values = (row.to_json() for row in rows)
    if columns is None:
        frame = pd.DataFrame(list(values))
    else:
        names = [*columns, *objectives]
        frame = pd.DataFrame(([row[name] for name in names] for row in values), columns=names)
    return frame.astype(dict.fromkeys(objectives, float))


def card_pairs(pairs: Labelled, count: int, seed: int) -> dict[str, list[Row]]:
    """Per objective the pairs that the judge's card is of.

    They are drawn by a hash, so that another number or further pairs leave those that are drawn already.

    Args:
        pairs: per objective, labelled pairs that nothing was trained on.
        count: of the pairs of an objective, `judge.card_pairs`.
        seed: of the run.
    """
    return {
        name: sorted(
            of_objective, key=lambda pair: digest([seed, pair["prompt"], pair["chosen"], pair["rejected"]])
        )[:count]
        for name, of_objective in pairs.items()
    }  # fmt: skip


def judge_card(pairs: Labelled, judge: JudgeSession, kind: str, bootstrap: Bootstrap) -> Row:
    """How far the judge agrees with held-out labels, for every objective.

    Per objective: `accuracy` with its interval over the prompts of pairs with a verdict (a tie agrees with no label),
    `undetermined` and `ties` as shares of the pairs asked, `reasons`, which counts the verdicts that are undetermined,
    and of a judge that saw both orders `position_bias`, the share of pairs whose verdict went with the place of a
    response and not with the response; of a reward model `truncated`, the share of texts that exceed its context.

    Args:
        pairs: those of `card_pairs`.
        judge: of the run.
        kind: its name on the card.
        bootstrap: of the intervals.
    """
    every, truncated, card = judge.verdicts(pairs), judge.truncated(pairs), {}
    for name, verdicts in every.items():
        scores = [mean_score(one) for one in verdicts]
        decided = [
            (pair["prompt"], score > 0.5)
            for pair, score in zip(pairs[name], scores, strict=True)
            if score is not None
        ]  # fmt: skip
        prompts, right = [prompt for prompt, _ in decided], [agrees for _, agrees in decided]
        both = [[one.score for one in each] for each in verdicts if len(each) == 2]
        turned = [each for each in both if None not in each]
        card[name] = {
            "accuracy": asdict(share(right, prompts, bootstrap)),
            "ties": _rate(score == 0.5 for score in scores),
            "undetermined": _rate(score is None for score in scores),
            "reasons": undetermined(verdicts),
            "position_bias": _rate(each[0] != each[1] and 0.5 not in each for each in turned) if turned else None,
            "truncated": truncated[name],
        }
    return {"kind": kind, "objectives": card}


def check_card(card: Row) -> None:
    """Refuse a judge that gives no verdict, before anything else is asked of it.

    Raises:
        UserError: all pairs of an objective's card are undetermined.
    """
    for name, metrics in card["objectives"].items():
        if metrics["undetermined"] == 1:
            raise UserError(
                f"the judge gives no verdict on {name}: all pairs of its card are undetermined "
                f"({reasons_text(metrics['reasons'])}): {HINT}."
            )


def card_lines(card: Row) -> list[str]:
    """The card as it is printed, a line for each objective."""
    lines = []
    for name, metrics in card["objectives"].items():
        accuracy = metrics["accuracy"]["value"]
        shown = "nothing to agree with" if accuracy is None else f"{accuracy:.3f} of held-out pairs as labelled"
        why = f" ({reasons_text(metrics['reasons'])})" if metrics["reasons"] else ""
        cut = f", {metrics['truncated']:.3f} of the texts truncated" if metrics["truncated"] else ""
        lines.append(f"{card['kind']}: {name}: {shown}, undetermined {metrics['undetermined']:.3f}{why}{cut}")
    return lines


def _rate(true: Iterable[bool]) -> float:
    listed = list(true)
    return sum(listed) / max(1, len(listed))


def win_rates(scored: pd.DataFrame, control: str, objectives: Sequence[str], bootstrap: Bootstrap) -> pd.DataFrame:
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
    for point, of_point in scored.groupby("point", sort=False):
        paired = of_point.set_index(keys).join(against, rsuffix="_control", how="inner", validate="one_to_one")
        for name in objectives:
            compared = paired[name] - paired[f"{name}_control"]
            difference = compared.dropna()
            won = (difference > 0) + 0.5 * (difference == 0)
            by_prompt = won.groupby("prompt").mean().to_numpy()
            mean, low, high = bootstrap_mean(by_prompt, bootstrap)
            ties, undetermined = int((difference == 0).sum()), len(compared) - len(difference)
            lines.append((point, name, mean, low, high, ties, undetermined, len(by_prompt)))
    return pd.DataFrame(
        lines, columns=["point", "objective", "win_rate", "ci_low", "ci_high", "ties", "undetermined", "prompts"]
    )  # fmt: skip
