"""Verdicts of judges that read: every reply is kept as it comes, and none is asked for twice."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from pipeline.config.errors import UserError
from pipeline.config.schema import LlmJudge, LocalJudge, Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import digest
from pipeline.data.row_store import RowStore
from pipeline.evaluation.judges.llm import LlmAsked
from pipeline.evaluation.judges.local_llm import LocalAsked
from pipeline.evaluation.judges.rubric import Question, read_rubric

Pair = tuple[str, str, str]  # a prompt, a response, and another


class Asked(Protocol):
    """Who answers questions: an endpoint, or a local model."""

    @property
    def identity(self) -> list[Any]:
        """What replies depend on beside the question."""

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        """Yield (index, raw reply) as they come."""


class Verdicts:
    """A judge's verdicts on pairs for one objective.

    Raises:
        UserError: there is no rubric for the objective, or the judge lacks what it needs.
    """

    def __init__(self, judge: LlmJudge | LocalJudge, params: Params, workspace: Workspace, objective: str) -> None:
        if objective not in judge.rubrics:
            raise UserError(f"judge.rubrics has none for {objective}: add judge.rubrics.{objective}=overall.")
        self._rubric, self._judge, self._objective = read_rubric(judge.rubrics[objective]), judge, objective
        self._asked: Asked = LlmAsked(judge) if isinstance(judge, LlmJudge) else LocalAsked(judge, params, workspace)
        self._path = workspace.scratch / "store" / "verdicts.jsonl"

    def of(self, pairs: Sequence[Pair]) -> list[tuple[float | None, ...]]:
        """The verdicts on each pair, one per order: 1 if its first response is better, 0 if its second, 1/2 for a tie.

        None is a reply that says no verdict.

        Raises:
            UserError: `max_calls` is reached, or no answer could be had; answers so far are kept.
        """
        asked = [[(self._key(one), one, turned) for one, turned in self._orders(*pair)] for pair in pairs]
        wanted = {key: one for orders in asked for key, one, _ in orders}
        store = RowStore(self._path, wanted)
        self._fill(store, {key: one for key, one in wanted.items() if key not in store})
        return [
            tuple(_outcome(one.parse(store[key]["reply"]), turned) for key, one, turned in orders) for orders in asked
        ]

    def _key(self, question: Question) -> str:
        return digest([self._asked.identity, question.messages()])

    def _orders(self, prompt: str, first: str, second: str) -> list[tuple[Question, bool]]:
        """The orders the pair is asked in, and whether each is turned round."""
        question = Question(self._rubric, prompt, first, second)
        both = [(question, False), (question.turned, True)]
        if self._judge.orders == "both":
            return both
        # Drawn from the two texts themselves: whoever asks about them, they meet in the same order.
        lot = int(digest([prompt, *sorted([first, second])])[-1], 16) % 2
        return [both[lot ^ (first > second)]]

    def _fill(self, store: RowStore, missing: Mapping[str, Question]) -> None:
        most = self._judge.max_calls
        taken = list(missing)[:most]
        with tqdm(total=len(taken), desc=f"judge {self._objective}", unit="call", disable=not taken) as bar:
            for index, reply in self._asked.ask([missing[key] for key in taken]):
                store.add([(taken[index], {"objective": self._objective, "reply": reply})])
                bar.update()
        if left := len(missing) - len(taken):
            raise UserError(
                f"judge.max_calls={most} is reached and {left} questions on {self._objective} are left: run again to "
                "go on, or raise it; answers so far are kept."
            )


def _outcome(choice: str | None, turned: bool) -> float | None:
    if choice is None or choice == "TIE":
        return None if choice is None else 0.5
    return float((choice == "A") != turned)
