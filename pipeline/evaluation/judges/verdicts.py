"""Verdicts of judges that read: every reply is kept as it comes, and none is asked for twice."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.config.errors import UserError
from pipeline.config.judges import LlmJudge, LocalJudge
from pipeline.data.files import digest
from pipeline.data.row_store import RowStore
from pipeline.evaluation.judges.llm import EndpointModel
from pipeline.evaluation.judges.progress import Progress
from pipeline.evaluation.judges.reply import Reply
from pipeline.evaluation.judges.resources import Resources
from pipeline.evaluation.judges.rubric import Question, read_rubric

Pair = tuple[str, str, str]  # a prompt, a response, and another


class JudgeModel(Protocol):
    """A model that answers questions: behind an endpoint, or a local one."""

    @property
    def identity(self) -> list[Any]:
        """What replies depend on beside the question."""

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Reply], None]) -> None:
        """Ask all; `keep(index, reply)` gets every reply the moment it is there, from one thread at a time."""


@dataclass(frozen=True)
class _Order:
    """A pair in one of the orders that it is asked in."""

    key: str  # of the reply in the row store
    question: Question
    turned: bool  # whether the judge sees the pair's second response first


_Orders = dict[str, list[list[_Order]]]  # per objective and pair


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a pair in one order."""

    score: float | None  # 1 if the first response is better, 0 if the second is, 1/2 for a tie; None: undetermined
    reason: str | None = None  # why it is undetermined


class Verdicts:
    """A judge's verdicts on pairs, for every objective; made once for a run, whose budget it keeps.

    Args:
        judge: who is asked.
        objectives: their names.
        resources: the models at hand, among them a local judge, and the stores, which keep the replies.

    Raises:
        UserError: there is no rubric for an objective, or the judge lacks what it needs.
    """

    def __init__(self, judge: LlmJudge | LocalJudge, objectives: Sequence[str], resources: Resources) -> None:
        for name in objectives:
            if name not in judge.rubrics:
                raise UserError(f"judge.rubrics has none for {name}: add judge.rubrics.{name}=overall.")
        self._rubrics = {name: read_rubric(judge.rubrics[name]) for name in objectives}
        self._model: JudgeModel
        if isinstance(judge, LlmJudge):
            self._model = EndpointModel(judge)
        else:
            from pipeline.evaluation.judges.local_llm import LocalModel  # seconds to import: torch and transformers

            self._model = LocalModel(judge, resources.source(judge.model), resources.device)
        self._judge, self._path = judge, resources.store / "verdicts.jsonl"
        self._calls = 0  # of this run

    def of(self, pairs: Mapping[str, Sequence[Pair]]) -> dict[str, list[tuple[Verdict, ...]]]:
        """The verdicts on the pairs of every objective, one per order in which a pair is asked.

        Raises:
            UserError: `judge.max_calls` is reached, or no answer could be had; answers so far are kept.
            OSError: an answer could not be kept, so no further question was asked.
        """
        orders = self._orders(pairs)
        store = RowStore(self._path, _keys(orders))
        self._fill(store, _missing(orders, store))
        return {
            name: [
                tuple(_verdict(one.question, Reply.of_row(store[one.key]), one.turned) for one in of_pair)
                for of_pair in of_objective
            ]
            for name, of_objective in orders.items()
        }

    def outlook(self, pairs: Iterable[Mapping[str, Sequence[Pair]]]) -> str:
        """What it would take to have the verdicts on all of these pairs: calls, tokens, and what they cost."""
        groups = [self._orders(group) for group in pairs]
        keys = {key for group in groups for key in _keys(group)}
        store = RowStore(self._path, keys)
        left = {key: question for group in groups for key, (_, question) in _missing(group, store).items()}
        shown = f"{len(keys)} questions, {len(keys) - len(left)} of them answered before"
        if not left:
            return shown
        most = self._judge.max_calls
        budget = "" if most is None or most >= len(left) else f"; judge.max_calls ends this run after {most}"
        return f"{shown}, {Progress(self._judge, list(left.values())).left}{budget}"

    def _orders(self, pairs: Mapping[str, Sequence[Pair]]) -> _Orders:
        identity, both = self._model.identity, self._judge.orders == "both"
        return {
            name: [
                [
                    _Order(digest([identity, question.messages()]), question, turned)
                    for question, turned in _in_order(Question(self._rubrics[name], *pair), both)
                ]
                for pair in of_objective
            ]
            for name, of_objective in pairs.items()
        }

    def _fill(self, store: RowStore, missing: Mapping[str, tuple[str, Question]]) -> None:
        """Ask what is missing, as far as the run's budget goes."""
        most = self._judge.max_calls
        keys = list(missing)[: None if most is None else most - self._calls]
        questions = [missing[key][1] for key in keys]
        self._calls += len(keys)
        with Progress(self._judge, questions) as progress:

            def keep(index: int, reply: Reply) -> None:
                key = keys[index]
                store.add([(key, {"objective": missing[key][0], **reply.row()})])
                progress.add(reply)

            self._model.ask(questions, keep)
        if left := list(missing.values())[len(keys) :]:
            objectives = ", ".join(dict.fromkeys(name for name, _ in left))
            raise UserError(
                f"judge.max_calls={most} is reached and {len(left)} questions on {objectives} are left: run again to "
                "go on, or raise it; answers so far are kept."
            )


def _in_order(question: Question, both: bool) -> list[tuple[Question, bool]]:
    """A question in the orders it is asked in, and whether each is turned round."""
    orders = [(question, False), (question.turned, True)]
    if both:
        return orders
    # Drawn from the two texts themselves: whoever asks about them, they meet in the same order.
    first, second = question.first, question.second
    lot = int(digest([question.prompt, *sorted([first, second])])[-1], 16) % 2
    return [orders[lot ^ (first > second)]]


def _keys(orders: _Orders) -> list[str]:
    return [one.key for of_objective in orders.values() for of_pair in of_objective for one in of_pair]


def _missing(orders: _Orders, store: RowStore) -> dict[str, tuple[str, Question]]:
    """The questions without a reply, each with its objective; one that several objectives share is asked once."""
    missing: dict[str, tuple[str, Question]] = {}
    for name, of_objective in orders.items():
        for of_pair in of_objective:
            for one in of_pair:
                if one.key not in store:
                    missing.setdefault(one.key, (name, one.question))
    return missing


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
