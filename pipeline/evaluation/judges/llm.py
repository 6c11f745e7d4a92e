"""A model behind an endpoint that speaks OpenAI's chat protocol, asked many questions at once and patiently."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, cast

from pipeline.config.errors import UserError
from pipeline.config.schema import LlmJudge
from pipeline.evaluation.judges.rubric import Question

_LONGEST_WAIT = 60.0  # seconds between two attempts


class LlmAsked:
    """The endpoint's replies.

    Raises:
        UserError: the extra is not installed, or the key is not in the environment.
    """

    def __init__(self, judge: LlmJudge) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("judge=llm needs the openai client: pip install 'genarm-pipeline[llm]'.") from error
        key = os.environ.get(judge.api_key_env)
        if not key:
            raise UserError(f"{judge.api_key_env} is not set: export the key of {judge.base_url} under that name.")
        self._judge, self._key, self._openai = judge, key, openai
        self._client = openai.OpenAI(base_url=judge.base_url, api_key=key, timeout=judge.timeout, max_retries=0)

    @property
    def identity(self) -> list[Any]:
        """What its replies depend on beside the question."""
        judge = self._judge
        asked = {"temperature": judge.temperature, "max_tokens": judge.max_tokens, **judge.extra_body}
        return ["llm", judge.base_url, judge.model, asked]

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, str]]:
        """Yield (index, raw reply) as replies come; questions that are under way when one fails are still answered.

        Raises:
            UserError: the endpoint refuses, or does not answer after all attempts.
        """
        failed: UserError | None = None
        with ThreadPoolExecutor(self._judge.concurrency) as pool:
            futures = {pool.submit(self._reply, question): index for index, question in enumerate(questions)}
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                try:
                    yield futures[future], future.result()
                except UserError as error:
                    failed = failed or error
                    for waiting in futures:
                        waiting.cancel()
        if failed is not None:
            raise failed

    def _reply(self, question: Question) -> str:
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

        patient = (
            self._openai.RateLimitError, self._openai.APIConnectionError, self._openai.InternalServerError,
            self._openai.APIResponseValidationError, ValueError,
        )  # fmt: skip
        try:
            for attempt in Retrying(
                retry=retry_if_exception_type(patient), stop=stop_after_attempt(self._judge.attempts),
                wait=_wait, reraise=True,
            ):  # fmt: skip
                with attempt:
                    return self._once(question)
        except (self._openai.OpenAIError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].replace(self._key, "***")[:200]
            raise UserError(
                f"{self._judge.base_url} did not answer after {self._judge.attempts} attempts at most ({reason}): "
                "check judge.base_url, judge.model and the key, and run again; answers so far are kept."
            ) from None
        raise AssertionError

    def _once(self, question: Question) -> str:
        judge = self._judge
        said: dict[str, Any] = {judge.max_tokens_name: judge.max_tokens}
        if judge.temperature is not None:
            said["temperature"] = judge.temperature
        answer = self._client.chat.completions.create(
            model=judge.model, messages=cast(Any, question.messages()), extra_body=judge.extra_body, **said
        )
        if not getattr(answer, "choices", None):
            raise ValueError("the reply holds no choices")
        return answer.choices[0].message.content or ""


def _wait(state: Any) -> float:
    """Seconds before the next attempt: what the endpoint asks for, or twice as long as before with some jitter."""
    error = state.outcome.exception() if state.outcome is not None else None
    response = getattr(error, "response", None)
    asked = response.headers.get("retry-after") if response is not None else None
    try:
        return min(float(asked), _LONGEST_WAIT) if asked is not None else _back_off(state)
    except ValueError:  # a date
        return _back_off(state)


def _back_off(state: Any) -> float:
    from tenacity import wait_random_exponential

    return float(wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT)(state))
