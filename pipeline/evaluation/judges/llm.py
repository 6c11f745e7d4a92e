"""A model behind an endpoint that speaks OpenAI's chat protocol, asked several questions at once and patiently.

openai's own retries are switched off: their waits cannot be cut short, and when one question fails for good, or the
run is interrupted, the others must not wait for minutes.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event, Lock
from typing import Any, cast

from pipeline.config.errors import UserError
from pipeline.config.judges import LlmJudge
from pipeline.evaluation.judges.reply import Reply, refusal_reason
from pipeline.evaluation.judges.rubric import Question

_LONGEST_WAIT = 60.0  # seconds between two attempts
_REFUSABLE = (400, 403, 413, 422)  # statuses that may be about one question
_INTERRUPTIBLE = 0.05  # seconds: an interrupt that reaches another thread does not wake one that waits
_DOUBTFUL = 8  # refusals in a row, for no known reason, that are taken for one of the settings

Keep = Callable[[int, Reply], None]


class OddBodyError(ValueError):
    """A body that is no reply at all, such as a gateway's page: the question is asked again."""


class RefusedError(Exception):
    """A question was refused, perhaps because of the settings that all have in common."""


class EndpointModel:
    """A judge that is asked over the network.

    Raises:
        UserError: the extra is not installed, or the key is not in the environment.
    """

    def __init__(self, judge: LlmJudge) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("judge=llm needs the openai client: pip install 'genarm-pipeline[llm]'.") from error
        key = os.environ.get(judge.api_key_env, "").strip()
        if not key:
            raise UserError(f"{judge.api_key_env} is not set: export the key of {judge.base_url} under that name.")
        if not (key.isascii() and key.isprintable()):  # an error of the client would print it
            raise UserError(f"{judge.api_key_env} holds characters that no key has: export it again, in one line.")
        self._judge, self._key, self._openai = judge, key, openai
        self._client = openai.OpenAI(base_url=judge.base_url, api_key=key, timeout=judge.timeout, max_retries=0)

    @property
    def identity(self) -> list[Any]:
        """What its replies depend on beside the question."""
        judge = self._judge
        settings = {"temperature": judge.temperature, "max_tokens": judge.max_tokens, **judge.extra_body}
        return ["llm", judge.base_url, judge.model, settings]

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Ask `judge.concurrency` questions at a time; `keep(index, reply)` gets every reply the moment it is there.

        When a question fails for good, a reply cannot be kept, or the run is interrupted, no further question is
        asked, and the replies under way are still kept.

        Args:
            questions: to be asked.
            keep: called by one thread at a time.

        Raises:
            UserError: the endpoint refuses, or does not answer after all attempts.
            Exception: whatever `keep` raises.
        """
        run = _Run(enumerate(questions), keep)
        with ThreadPoolExecutor(self._judge.concurrency) as pool:
            try:
                working = [pool.submit(self._work, run) for _ in range(self._judge.concurrency)]
                while wait(working, timeout=_INTERRUPTIBLE).not_done:
                    pass
            finally:
                run.stopped.set()
        if run.failures:
            raise run.failures[0]
        run.settle()

    def _work(self, run: "_Run") -> None:
        """Ask one question after the other until there are none, or the run is stopped."""
        try:
            while (item := run.next()) is not None:
                index, question = item
                run.take(index, *self._reply(question, run.stopped))
        except BaseException as error:
            run.fail(error)

    def _reply(self, question: Question, stopped: Event) -> tuple[Reply, UserError | None]:
        """The reply, and if the question was refused for no known reason the error that it may be.

        Raises:
            UserError: no answer after all attempts, or a refusal of whatever is asked.
        """
        from tenacity import (
            Retrying,
            retry_if_exception,
            sleep_using_event,
            stop_after_attempt,
            stop_when_event_set,
        )

        stop = stop_after_attempt(self._judge.attempts) | stop_when_event_set(stopped)
        try:
            for attempt in Retrying(
                retry=retry_if_exception(self._passes), stop=stop, sleep=sleep_using_event(stopped), wait=_wait,
                reraise=True,
            ):  # fmt: skip
                with attempt:
                    return Reply.of_body(self._body(question)), None
        except (self._openai.OpenAIError, OddBodyError) as error:
            status = getattr(error, "status_code", None)
            if status in _REFUSABLE and (reason := refusal_reason(str(error), getattr(error, "code", None))):
                return Reply(fault=reason), None
            failure = self._failure(error)
            if status in _REFUSABLE and status != 403:  # a key may be revoked at any time
                return Reply(fault=f"refused with status {status}"), failure
            raise failure from None
        raise AssertionError

    def _passes(self, error: BaseException) -> bool:
        """Whether another attempt may mend it."""
        status = getattr(error, "status_code", 0)
        return isinstance(error, self._openai.APIConnectionError | OddBodyError) or status in (408, 409, 429) or (
            status >= 500
        )  # fmt: skip

    def _failure(self, error: Exception) -> UserError:
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(self._key, "***")[:200]
        return UserError(
            f"{self._judge.base_url} did not answer after {self._judge.attempts} attempts at most ({reason}): "
            "check judge.base_url, judge.model and the key, and run again; answers so far are kept."
        )

    def _body(self, question: Question) -> Any:
        """The JSON of the endpoint's answer, which need not have the shape that the client's types promise."""
        judge = self._judge
        settings: dict[str, Any] = {judge.max_tokens_name: judge.max_tokens}
        if judge.temperature is not None:
            settings["temperature"] = judge.temperature
        answer = self._client.chat.completions.with_raw_response.create(
            model=judge.model, messages=cast(Any, question.messages()), extra_body=judge.extra_body, **settings
        )
        try:
            body = json.loads(answer.http_response.content)
        except (ValueError, RecursionError) as error:
            raise OddBodyError("the answer is not JSON") from error
        if not isinstance(body, dict):
            raise OddBodyError("the answer is not a JSON object")
        if body.get("error") and not body.get("choices"):
            reason = refusal_reason(str(body["error"]), None)
            if reason is None:
                raise OddBodyError(f"the answer is an error: {str(body['error'])[:120]}")
            return {"choices": [{"finish_reason": reason}]}
        return body


class _Run:
    """The questions of one `ask`, handed to several threads; and what becomes of refusals for no known reason.

    Such a refusal is of that one question if the endpoint answers others that are put in the same way, and else of
    the settings: it waits until another question is answered.
    """

    def __init__(self, questions: Iterator[tuple[int, Question]], keep: Keep) -> None:
        self._questions, self._keep, self._lock = questions, keep, Lock()
        self._answered, self._refused = False, list[tuple[int, Reply, UserError]]()
        self.stopped, self.failures = Event(), list[BaseException]()

    def next(self) -> tuple[int, Question] | None:
        with self._lock:
            return None if self.stopped.is_set() else next(self._questions, None)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self.failures.append(error)
            self.stopped.set()

    def take(self, index: int, reply: Reply, refusal: UserError | None) -> None:
        with self._lock:
            if refusal is None:
                self._keep(index, reply)
                self._answered = True
                self.settle()
            else:
                self._refused.append((index, reply, refusal))
                if len(self._refused) > _DOUBTFUL:
                    raise refusal

    def settle(self) -> None:
        """Keep the refusals that wait.

        Raises:
            UserError: nothing was answered.
        """
        for index, reply, refusal in self._refused:
            if not self._answered:
                raise refusal
            self._keep(index, reply)
        self._refused.clear()


def _wait(state: Any) -> float:
    """Seconds before the next attempt: what the endpoint asks for, or twice as long as before with some jitter."""
    error = state.outcome.exception() if state.outcome is not None else None
    response = getattr(error, "response", None)
    seconds = response.headers.get("retry-after") if response is not None else None
    try:
        return _back_off(state) if seconds is None else max(0.0, min(float(seconds), _LONGEST_WAIT))
    except ValueError:  # a date
        return _back_off(state)


def _back_off(state: Any) -> float:
    from tenacity import wait_random_exponential

    return float(wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT)(state))
