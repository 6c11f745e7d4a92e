"""Control tokens belong to templates: the same characters inside somebody's text stay text.

A tokenizer turns `<|im_end|>` into the token that ends a turn wherever it stands, so a text could forge turns. Here the
names of control tokens in texts are exchanged for aliases before a template is filled in; should there be any, a twin
of the tokenizer, which knows control tokens by their aliases only, reads the result with both exchanged back.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from pipeline.config.errors import UserError

if TYPE_CHECKING:  # importing it takes seconds, and counting needs none of it
    from transformers import PreTrainedTokenizerBase


def control_names(folder: Path) -> frozenset[str]:
    """The special tokens of a model's folder, by name, from its tokenizer.json alone.

    Raises:
        UserError: it has none, or a damaged one.
    """
    try:
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        return frozenset(token["content"] for token in added if token["special"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'tokenizer.json'} is missing or damaged: run `dvc repro --force fetch`.") from error


class ControlTokens:
    """The tokens of a tokenizer that steer a model and are no text.

    Args:
        tokenizer: a fast one.
        marks: what a template writes around texts; tokens in it are control tokens even if they are not special ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: str = "") -> None:
        self._tokenizer = tokenizer
        names = set(tokenizer.all_special_tokens)
        for token in tokenizer.added_tokens_decoder.values():
            if token.special or (token.content.strip() and token.content in marks):
                names.add(token.content)
        key = secrets.token_hex(8)  # drawn anew, so that no text can hold an alias; token ids do not depend on it
        self._aliases = {name: f"<{key}-{place}>" for place, name in enumerate(sorted(names))}
        self._exchange = {**self._aliases, **{alias: name for name, alias in self._aliases.items()}}
        self._either = re.compile("|".join(map(re.escape, sorted(self._exchange, key=len, reverse=True))) or "(?!)")
        self._alias = re.compile(f"<{key}-\\d+>")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template: str | None) -> ControlTokens:
        """Those of a tokenizer and a template, a plain text or (None) the tokenizer's chat template.

        Raises:
            UserError: the chat template cannot be filled in.
        """
        if template is not None:
            return cls(tokenizer, template)
        turn, special = [{"role": "user", "content": ""}], cls(tokenizer)
        end = tokenizer.convert_ids_to_tokens(turn_end(tokenizer, None))
        return cls(tokenizer, fill_chat_template(tokenizer, turn, False, special) + str(end))

    def count(self, text: str) -> int:
        """How often a text spells a control token."""
        return len(self._either.findall(text))

    def escape(self, text: str) -> str:
        """A text to be put into a template, whose result goes to `ids`."""
        return self._either.sub(lambda match: self._exchange[match[0]], text)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and behind a text, such as beginning- and end-of-sequence."""
        read = self._tokenizer("a", return_special_tokens_mask=True)
        first, last = read.special_tokens_mask.index(0), -(read.special_tokens_mask[::-1].index(0))
        return read.input_ids[:first], read.input_ids[last:] if last else []

    def begun(self, ids: list[int]) -> list[int]:
        """Token ids with the tokens that begin a text, unless a template has spelled them."""
        before = self.around[0]
        return ids if ids[: len(before)] == before else [*before, *ids]

    def ended(self, ids: list[int]) -> list[int]:
        """Token ids with the tokens that end a text, unless a template has spelled them."""
        behind = self.around[1]
        return ids if ids[len(ids) - len(behind) :] == behind else [*ids, *behind]

    def ids(self, text: str) -> list[int]:
        """Token ids of a template that is filled in with escaped texts; the tokenizer adds no tokens of its own."""
        if not self._alias.search(text):
            return list(self._tokenizer(text, add_special_tokens=False).input_ids)
        twin, added = self._twin
        return [added.get(token, token) for token in twin.encode(self.escape(text), add_special_tokens=False).ids]

    @cached_property
    def _twin(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with aliases for names, and the ids that its added tokens stand for."""
        described = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in described["added_tokens"]:
            token["content"] = self._aliases.get(token["content"], token["content"])
        described["post_processor"] = None  # it adds tokens and changes no others
        twin = Tokenizer.from_str(json.dumps(described))
        own = {token["content"]: int(token["id"]) for token in described["added_tokens"]}
        return twin, {place: own[token.content] for place, token in twin.get_added_tokens_decoder().items()}


def fill_chat_template(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], prompting: bool, control: ControlTokens,
    options: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """A dialogue in the tokenizer's chat template, for `control.ids`.

    Args:
        prompting: whether the assistant is to go on from there.
        options: further variables of the template; texts among them are escaped as the turns are.

    Raises:
        UserError: the template does not take these turns.
    """
    escaped = [{"role": turn["role"], "content": control.escape(turn["content"])} for turn in turns]
    variables: dict[str, Any] = {
        name: control.escape(value) if isinstance(value, str) else value for name, value in (options or {}).items()
    }
    try:
        return str(tokenizer.apply_chat_template(escaped, tokenize=False, add_generation_prompt=prompting, **variables))
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template does not take the turns {', '.join(t['role'] for t in turns)}"
            f" ({error}), as in {turns[-1]['content'][:60]!r}: leave such prompts out, or set the model's template, a "
            "text with {prompt}."
        ) from error


def turn_end(tokenizer: PreTrainedTokenizerBase, template: str | None) -> int:
    """The token that ends a response: the one behind the assistant's turn in the chat template, else end-of-sequence.

    It need not be end-of-sequence: Gemma's is `<end_of_turn>`, Phi-3's `<|end|>`. A template that is a plain text has
    it only if it spells it itself.

    Raises:
        UserError: the chat template cannot be filled in.
    """
    probe, names = "Certainly", {token.content: place for place, token in tokenizer.added_tokens_decoder.items()}
    if tokenizer.chat_template and (template is None or any(name in template for name in names)):
        turns = [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": probe}]
        behind = fill_chat_template(tokenizer, turns, False, ControlTokens(tokenizer)).rpartition(probe)[2].lstrip()
        end = max((name for name in names if name.strip() and behind.startswith(name)), key=len, default=None)
        if end is not None and (template is None or end in template):
            return names[end]
    return int(tokenizer.eos_token_id)
