"""What a judge that reads answers to one question: text, or why there is none. Whatever comes can be stored."""

import re
from dataclasses import dataclass
from typing import Any

from pipeline.data.files import Row

CONTENT_FILTER, CONTEXT_LENGTH = "content_filter", "context_length_exceeded"  # OpenAI's codes of a refused question
NO_VERDICT = "no verdict in the last line"
_FINISHED = (None, "stop", "eos")
_MOST_TOKENS = 1e9  # of one reply: what endpoints count beyond is no count


@dataclass(frozen=True)
class Reply:
    """One answer, as it is kept."""

    text: str = ""
    finish_reason: str | None = None  # of the endpoint: `length` where max_tokens ran out
    fault: str | None = None  # why there is no text to read a verdict from
    usage: tuple[int, int] | None = None  # tokens read and written, as the endpoint counts them

    @classmethod
    def of_body(cls, body: Any) -> "Reply":
        """The reply in a JSON body of OpenAI's chat protocol; whatever is odd about it is named as its fault."""
        choices = body.get("choices") if isinstance(body, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return cls(fault="no choices")
        message, finish = choice.get("message"), choice.get("finish_reason")
        if not isinstance(message, dict):
            message = {}
        content, usage = message.get("content"), _usage(body.get("usage"))
        finish = _word(finish) if isinstance(finish, str) else None
        if isinstance(content, str):
            # Half a surrogate pair, which JSON may spell, is no character: no file and no request could hold it.
            return cls(content.encode("utf-8", "replace").decode(), finish, None, usage)
        refused = isinstance(message.get("refusal"), str)
        return cls("", finish, "refusal" if refused else f"content is {_kind(content)}", usage)

    @classmethod
    def of_row(cls, row: Row) -> "Reply":
        """The reply that `row` keeps."""
        text, usage = row["reply"], row.get("usage")
        if not isinstance(text, str):  # kept by a version that stored whatever came
            return cls(fault=f"content is {_kind(text)}")
        return cls(text, row.get("finish_reason"), row.get("fault"), tuple(usage) if usage else None)

    def row(self) -> Row:
        """The reply as a JSON object."""
        row: Row = {"reply": self.text, "finish_reason": self.finish_reason}
        if self.fault is not None:
            row["fault"] = self.fault
        if self.usage is not None:
            row["usage"] = list(self.usage)
        return row

    @property
    def reason(self) -> str:
        """Why no verdict could be read from it."""
        if self.finish_reason not in _FINISHED:
            return CONTENT_FILTER if self.finish_reason == CONTENT_FILTER else f"finish_reason={self.finish_reason}"
        return self.fault or NO_VERDICT


def _usage(counts: Any) -> tuple[int, int] | None:
    if not isinstance(counts, dict):
        return None
    read, written = counts.get("prompt_tokens"), counts.get("completion_tokens")
    known = all(type(count) is int and 0 <= count < _MOST_TOKENS for count in (read, written))
    return (read, written) if known else None  # type: ignore[return-value]


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number")


def _word(text: str) -> str:
    """A word of an endpoint's, fit to be printed."""
    return re.sub(r"[^A-Za-z0-9_.-]", "?", text)[:40]


def refusal_reason(message: str, code: Any) -> str | None:
    """Why an endpoint refused this one question; None where the refusal names no such reason.

    Args:
        message: what it said.
        code: OpenAI's `error.code`, which not every server has.
    """
    known = {
        CONTENT_FILTER: r"content[ _]?(filter|policy|management)|invalid_prompt|moderation|flagged|ResponsibleAI",
        CONTEXT_LENGTH: r"context[ _]?(length|window|size)|string_above_max_length|(prompt|input) is too long",
    }
    shown = f"{code} {message}"
    return next((reason for reason, pattern in known.items() if re.search(pattern, shown, re.IGNORECASE)), None)
