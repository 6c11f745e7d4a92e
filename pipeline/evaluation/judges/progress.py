"""How far a judge is: a bar with the calls, time, tokens and cost that are left."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from pipeline.config.judges import LlmJudge, LocalJudge
from pipeline.evaluation.judges.reply import Reply
from pipeline.evaluation.judges.rubric import Question

CHARACTERS = 4  # of a token, until the endpoint has counted some


class Progress:
    """A bar over a judge's questions.

    Tokens left are reckoned from the replies whose tokens the endpoint counted; before there is one, from the length of
    the questions and `judge.max_tokens`, and so too many rather than too few.

    Args:
        judge: who is asked.
        questions: that are to be asked.
    """

    def __init__(self, judge: LlmJudge | LocalJudge, questions: Sequence[Question]) -> None:
        self._judge, self._left = judge, len(questions)
        characters = sum(len(message["content"]) for one in questions for message in one.messages())
        self._guess = characters / CHARACTERS / max(1, len(questions))
        self._counted, self._read, self._written = 0, 0, 0
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> "Progress":
        bar: tqdm[Any] = tqdm(total=self._left, desc="judge", unit="call", disable=not self._left)
        bar.set_postfix_str(self.left)
        self._bar = bar
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, reply: Reply) -> None:
        """Count one reply."""
        self._left -= 1
        if reply.usage is not None:
            self._counted += 1
            self._read, self._written = self._read + reply.usage[0], self._written + reply.usage[1]
        if self._bar is not None:
            self._bar.set_postfix_str(self.left, refresh=False)
            self._bar.update()

    @property
    def left(self) -> str:
        """What is still to be asked: calls, and of an endpoint tokens and cost."""
        calls = f"{self._left} calls left"
        if not isinstance(self._judge, LlmJudge):
            return calls
        read, written, about = self._guess, float(self._judge.max_tokens), "at most"
        if self._counted:
            read, written, about = self._read / self._counted, self._written / self._counted, "about"
        read, written = self._left * read, self._left * written
        tokens = f"{calls}, {about} {read / 1e6:.2g} M tokens read and {written / 1e6:.2g} M written"
        if self._judge.price is None:
            return tokens
        return f"{tokens}, cost {token_cost(read, written, self._judge.price):.2f}"


def token_cost(read: float, written: float, price: tuple[float, float]) -> float:
    """Cost of tokens at prices of a million read and a million written."""
    return (read * price[0] + written * price[1]) / 1e6
