r"""Dialogues as text: turns marked as in HH-RLHF, "\n\nHuman: …\n\nAssistant: …", the last of them unanswered.

So a prompt stays one text whether it has one turn or many. What comes as a list of messages is spelled this way, and
models with a chat template are asked the turns that `turns_of` reads back. A prompt of one message of a user needs no
marks: it is the message itself.
"""

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from pipeline.data.splits import canonical

Message = dict[str, str]
Text = str | list[Message]  # as rows have it

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


def transcript(text: str) -> str:
    """A text that begins with the mark of a turn, with the line ends that HH-RLHF has; any other text as it is."""
    marked = "\n\n" + text.replace("\r\n", "\n").lstrip()
    return marked if _ANY_MARK.match(marked) else text


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
    chosen, rejected = transcript(chosen), transcript(rejected)
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


def exchange(prompt: Text | None, response: Text, system: str | None = None) -> tuple[str, str]:
    """The prompt as one text and the answer to it, of a prompt and a response that may each be text or messages.

    Messages may hold the prompt as well (UltraFeedback), or turns that come behind it: all but the last, which is the
    answer, then belong to the prompt.

    Args:
        prompt: None where the messages of the response hold it.
        system: an instruction that stands before the dialogue.

    Raises:
        UnfitError: no prompt, prompts that contradict each other, or an answer that is not the assistant's.
    """
    if isinstance(response, str):
        if prompt is None:
            raise UnfitError("an empty prompt")
        return prompt_text(prompt, system), response
    if not response or response[-1]["role"] != "assistant":
        raise UnfitError("a response that is not the assistant's")
    before: Text = response[:-1]
    if prompt is not None:
        before = _joined(prompt, response[:-1]) if len(response) > 1 else prompt
    return prompt_text(before, system), response[-1]["content"]


def _joined(prompt: Text, before: list[Message]) -> list[Message]:
    """The turns of a prompt and of the messages before an answer, which repeat them or go on from them."""
    turns = turns_of(transcript(prompt)) if isinstance(prompt, str) else prompt
    ours, theirs = ([(turn["role"], canonical(turn["content"])) for turn in known] for known in (turns, before))
    if any(theirs[at : at + len(ours)] == ours for at in range(len(theirs))):
        return before
    if before[0]["role"] in ("system", *(turn["role"] for turn in turns[-1:])):
        raise UnfitError("a prompt that its messages contradict")
    return [*turns, *before]


def prompt_text(prompt: Text, system: str | None = None) -> str:
    """A prompt as one text, behind an instruction if there is one.

    Raises:
        UnfitError: messages that are no prompt, or that begin with another instruction.
    """
    if isinstance(prompt, str):
        marked = transcript(prompt)
        prompt = marked if is_dialogue(marked) else prompt
        if system is None:
            return prompt
    turns = turns_of(prompt) if isinstance(prompt, str) else prompt
    if system is None or turns[:1] == [instruction := {"role": "system", "content": system}]:
        return spelled(turns)
    if turns and turns[0]["role"] == "system":
        raise UnfitError("a system text that its messages contradict")
    return spelled([instruction, *turns])


def messages_of(value: Any) -> list[Message] | None:
    """The messages of a list of such, texts in parts joined; None of any other value.

    Raises:
        UnfitError: a message has no text, as a call of a tool, or something else than text, as a picture.
    """
    if not isinstance(value, list) or not all(
        isinstance(item, dict)
        and isinstance(item.get("role"), str)
        and isinstance(item.get("content"), str | list | None)
        for item in value
    ):
        return None
    return [{"role": item["role"], "content": _content(item)} for item in value]


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if content is None or message.get("tool_calls"):
        raise UnfitError("a message that calls a tool or has no text")
    if isinstance(content, str):
        return content
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise UnfitError("a message of something else than text")
    return "".join(texts)
