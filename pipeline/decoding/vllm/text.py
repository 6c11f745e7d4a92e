"""The text of a response as it grows token by token, which is sent before its end is known."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class GrowingText:
    """What of a text is certain: nothing behind a stop text, no part of one, no part of a character.

    Args:
        tokenizer: spells it, special tokens left out.
        stops: texts that end it; they are left out as well.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self.stopped_by: str | None = None  # the stop text that ended it
        self._tokenizer, self._stops = tokenizer, stops
        self._longest = max(map(len, stops), default=1)
        self._tokens: list[int] = []
        self._text = ""
        self._sent = 0  # characters of it
        self._start = 0  # tokens before are not decoded again
        self._decoded = 0  # tokens whose text is known

    def grow(self, tokens: Sequence[int], ended: bool) -> str:
        """What can be sent after these tokens; at the end, also what was held back."""
        self._tokens += tokens
        before, whole = self._decode(self._decoded), self._decode(len(self._tokens))
        if ended or not whole.endswith("\ufffd"):  # the last token of a character is still to come
            self._text += whole[len(before) :]
            self._start, self._decoded = self._decoded, len(self._tokens)
        # What was sent holds no stop text: the search begins where one could begin.
        places = [(self._text.find(stop, max(0, self._sent - self._longest)), stop) for stop in self._stops]
        end, self.stopped_by = min(
            ((place, stop) for place, stop in places if place >= 0), default=(len(self._text), None)
        )
        held = 0 if ended or self.stopped else self._longest - 1
        sent, self._sent = self._sent, max(self._sent, end - held)
        return self._text[sent : min(self._sent, end)]

    @property
    def stopped(self) -> bool:
        """Whether a stop text has ended it."""
        return self.stopped_by is not None

    def _decode(self, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[self._start : end], skip_special_tokens=True))
