"""Verdicts of judges that read: every reply is kept as it comes, and none is asked for twice."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.config.errors import UserError
from pipeline.config.schema import LlmJudge, LocalJudge, Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import digest
from pipeline.data.row_store import RowStore
from pipeline.evaluation.judges.llm import LlmAsked
from pipeline.evaluation.judges.local_llm import LocalAsked
from pipeline.evaluation.judges.progress import Progress
from pipeline.evaluation.judges.reply import Reply
from pipeline.evaluation.judges.rubric import Question, read_rubric

Pair = tuple[str, str, str]  # a prompt, a response, and another


class Asked(Protocol):
    """Who answers questions: an endpoint, or a local model."""

    @property
    def identity(self) -> list[Any]:
        """What replies depend on beside the question."""

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Reply], None]) -> None:
        """Ask all; `keep(index, reply)` gets every reply the moment it is there, from one thread at a time."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a pair in one order."""

    score: float | None  # 1 if the first response is better, 0 if the second is, 1/2 for a tie; None: undetermined
    reason: str | None = None  # why it is undetermined


class Verdicts:
    """A judge's verdicts on pairs, for every objective; made once for a run, whose budget it keeps.

    Raises:
        UserError: there is no rubric for an objective, or the judge lacks what it needs.
    """

    def __init__(self, judge: LlmJudge | LocalJudge, params: Params, workspace: Workspace) -> None:
        for name in params.objectives:
            if name not in judge.rubrics:
                raise UserError(f"judge.rubrics has none for {name}: add judge.rubrics.{name}=overall.")
        self._rubrics = {name: read_rubric(judge.rubrics[name]) for name in params.objectives}
        self._asked: Asked = LlmAsked(judge) if isinstance(judge, LlmJudge) else LocalAsked(judge, params, workspace)
        self._judge, self._path = judge, workspace.scratch / "store" / "verdicts.jsonl"
        self._calls = 0

    def of(self, pairs: Mapping[str, Sequence[Pair]]) -> dict[str, list[tuple[Verdict, ...]]]:
        """The verdicts on the pairs of every objective, one per order in which a pair is asked.

        Raises:
            UserError: `judge.max_calls` is reached, or no answer could be had; answers so far are kept.
            OSError: an answer could not be kept, so no further question was asked.
        """
        questions = self._questions(pairs)
        store = RowStore(self._path, (key for asked in questions.values() for orders in asked for key, *_ in orders))
        missing = _missing(questions, store)
        self._fill(store, missing)
        return {
            name: [
                tuple(_verdict(question, Reply.of_row(store[key]), turned) for key, question, turned in orders)
                for orders in asked
            ]
            for name, asked in questions.items()
        }

    def outlook(self, pairs: Iterable[Mapping[str, Sequence[Pair]]]) -> str:
        """What it would take to have the verdicts on all of these pairs: calls, tokens, and what they cost."""
        every = [self._questions(each) for each in pairs]
        keys = {key for each in every for asked in each.values() for orders in asked for key, *_ in orders}
        store = RowStore(self._path, keys)
        left = {key: one for each in every for key, (_, one) in _missing(each, store).items()}
        most = self._judge.max_calls
        budget = "" if most is None or most >= len(left) else f"; judge.max_calls ends this run after {most}"
        shown = f"{len(keys)} questions, {len(keys) - len(left)} of them answered before"
        return f"{shown}, {Progress(self._judge, list(left.values())).left}{budget}" if left else shown

    def _questions(self, pairs: Mapping[str, Sequence[Pair]]) -> dict[str, list[list[tuple[str, Question, bool]]]]:
        """Of every objective and pair the orders it is asked in: the reply's key, the question, whether turned."""
        identity = self._asked.identity
        return {
            name: [
                [
                    (digest([identity, one.messages()]), one, turned)
                    for one, turned in _orders(Question(self._rubrics[name], *pair), self._judge.orders == "both")
                ]
                for pair in of_objective
            ]
            for name, of_objective in pairs.items()
        }

    def _fill(self, store: RowStore, missing: Mapping[str, tuple[str, Question]]) -> None:
        """Ask what is missing, as far as the run's budget goes."""
        most = self._judge.max_calls
        taken = list(missing)[: None if most is None else most - self._calls]
        questions = [missing[key][1] for key in taken]
        self._calls += len(taken)
        with Progress(self._judge, questions) as progress:

            def keep(index: int, reply: Reply) -> None:
                store.add([(taken[index], {"objective": missing[taken[index]][0], **reply.row()})])
                progress.add(reply)

            self._asked.ask(questions, keep)
        if left := len(missing) - len(taken):
            raise UserError(
                f"judge.max_calls={most} is reached and {left} questions on {', '.join(_owners(missing, taken))} are "
                "left: run again to go on, or raise it; answers so far are kept."
            )


def _orders(question: Question, both: bool) -> list[tuple[Question, bool]]:
    """The orders a pair is asked in, and whether each is turned round."""
    orders = [(question, False), (question.turned, True)]
    if both:
        return orders
    # Drawn from the two texts themselves: whoever asks about them, they meet in the same order.
    first, second = question.first, question.second
    lot = int(digest([question.prompt, *sorted([first, second])])[-1], 16) % 2
    return [orders[lot ^ (first > second)]]


def _missing(
    questions: Mapping[str, Sequence[Sequence[tuple[str, Question, bool]]]], store: RowStore
) -> dict[str, tuple[str, Question]]:
    """The questions without a reply, each with its objective; one that several objectives share is asked once."""
    missing: dict[str, tuple[str, Question]] = {}
    for name, asked in questions.items():
        for orders in asked:
            for key, question, _ in orders:
                if key not in store:
                    missing.setdefault(key, (name, question))
    return missing


def _owners(missing: Mapping[str, tuple[str, Question]], taken: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(missing[key][0] for key in list(missing)[len(taken) :]))


def _verdict(question: Question, reply: Reply, turned: bool) -> Verdict:
    choice = question.parse(reply.text)
    if choice is None:
        return Verdict(None, reply.reason)
    return Verdict(0.5 if choice == "TIE" else float((choice == "A") != turned))


def mean_score(verdicts: Iterable[Verdict]) -> float | None:
    """The mean of the verdicts that were given on one pair; None where none was."""
    known = [verdict.score for verdict in verdicts if verdict.score is not None]
    return sum(known) / len(known) if known else None


def undetermined(verdicts: Iterable[Iterable[Verdict]]) -> dict[str, int]:
    """How many verdicts are undetermined, by reason, the most frequent first."""
    return dict(Counter(one.reason for each in verdicts for one in each if one.reason is not None).most_common())


def reasons_text(counts: Mapping[str, int]) -> str:
    """Counts of undetermined verdicts as a sentence has them."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
