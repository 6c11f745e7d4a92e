r"""Dialogues as text: turns marked as in HH-RLHF, "\n\nHuman: …\n\nAssistant: …", the last of them unanswered.

So a prompt stays one text whether it has one turn or many. What comes as a list of messages is spelled this way, and
models with a chat template are asked the turns that `turns_of` reads back. A prompt of one message of a user needs no
marks: it is the message itself.
"""

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

Message = dict[str, str]

_MARK = {"system": "\n\nSystem:", "user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
_ROLE = {mark: role for role, mark in _MARK.items()}
_ANY_MARK = re.compile("|".join(_ROLE))
_ANSWER = _MARK["assistant"]


class UnfitError(ValueError):
    """Why a row cannot be used, in a few words that are counted."""


def is_dialogue(prompt: str) -> bool:
    """Whether a prompt is spelled as a dialogue: it begins with the mark of a turn and ends with the assistant's."""
    return bool(_ANY_MARK.match(prompt)) and prompt.rstrip().endswith(_ANSWER.strip())


def turns_of(prompt: str) -> list[Message]:
    """The messages of a prompt: of a dialogue all its turns, stripped; any other text is one message of a user."""
    if not is_dialogue(prompt):
        return [{"role": "user", "content": prompt}]
    marks = list(_ANY_MARK.finditer(prompt))
    ends = [mark.start() for mark in marks[1:]]
    turns = zip(marks[:-1], ends, strict=True)  # the last mark opens the answer
    return [{"role": _ROLE[mark.group()], "content": prompt[mark.end() : end].strip()} for mark, end in turns]


def spelled(messages: Sequence[Message]) -> str:
    """The prompt that a list of messages is, up to where the assistant is to answer.

    Raises:
        UnfitError: no user, an unknown role, no text, or a text that holds the mark of a turn.
    """
    for message in messages:
        if message["role"] not in _MARK:
            raise UnfitError(f"a message of the role {message['role']}")
        if _ANY_MARK.search("\n\n" + message["content"].lstrip()):
            raise UnfitError("the mark of a turn inside a message")
        if not message["content"].strip():
            raise UnfitError("an empty message")
    if not messages or messages[-1]["role"] != "user":
        raise UnfitError("a prompt that no user asks")
    if len(messages) == 1:
        return messages[0]["content"]
    return "".join(f"{_MARK[message['role']]} {message['content'].strip()}" for message in messages) + _ANSWER


def divided(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt, chosen and rejected response of two texts that begin alike.

    Transcripts of HH-RLHF part behind the last mark of an answer that they share; other texts at the last word that
    they share.

    Raises:
        UnfitError: they share no beginning, or part before the last answer, so a response would have several turns.
    """
    shared = commonprefix([chosen, rejected])  # noqa: RUF071  of texts, not of paths
    if _ANY_MARK.match(shared):
        at = shared.rfind(_ANSWER) + len(_ANSWER)
        if at < len(_ANSWER):
            raise UnfitError("transcripts that share no answer")
        if any(_ANY_MARK.search(text, at) for text in (chosen, rejected)):
            raise UnfitError("transcripts that part before the last answer")
    else:
        # A word that goes on differently is no shared word, but whole texts may end where the other goes on.
        whole = all(text == shared or text[len(shared)].isspace() for text in (chosen, rejected))
        at = len(shared.rstrip() if whole else re.sub(r"\S*$", "", shared).rstrip())
        if not at:
            raise UnfitError("texts that share no prompt")
    return chosen[:at], chosen[at:], rejected[at:]


def divided_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected response of two lists of messages that differ in the last one, the assistant's.

    Raises:
        UnfitError: they differ before, or the last is not the assistant's, or the prompt is not one.
    """
    if chosen[:-1] != rejected[:-1]:
        raise UnfitError("transcripts that part before the last answer")
    return spelled(chosen[:-1]), answer(chosen), answer(rejected)


def answer(messages: Sequence[Message]) -> str:
    """The text of the last message, which must be the assistant's.

    Raises:
        UnfitError: it is somebody else's, or there is none.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise UnfitError("a response that is not the assistant's")
    return messages[-1]["content"]


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages with a role and a text each."""
    return isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in value
    )
