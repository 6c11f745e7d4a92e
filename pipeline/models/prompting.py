"""Texts to token ids and back, as a model's tokenizer and chat template have them.

Shapes: B rows, T time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from pipeline.config.errors import UserError
from pipeline.data.chat import is_dialogue, turns_of
from pipeline.models.control_tokens import ControlTokens, fill_chat_template, turn_end


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows padded on the left to one length, and the mask that is 1 on tokens: ids_BT, mask_BT."""
    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@dataclass(frozen=True)
class Prompter:
    """A model's way of being asked: its tokenizer and its prompt template.

    Prompts and responses are text: what spells a control token in them becomes the tokens of its letters.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None

    @classmethod
    def load(cls, folder: Path, template: str | None) -> "Prompter":
        """From a local model folder.

        Raises:
            UserError: no end-of-sequence token, no fast tokenizer, neither a template nor a chat template, or a chat
                template that cannot be filled in.
        """
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            raise UserError(f"{folder}: the tokenizer has no end-of-sequence token: set eos_token in its config.")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"{folder}: the tokenizer is not a fast one: add the model's tokenizer.json.")
        if template is None and not tokenizer.chat_template:
            raise UserError(f"{folder}: the tokenizer has no chat template: set base.template, a text with {{prompt}}.")
        if template is not None and "{prompt}" not in template:
            raise UserError(f"base.template {template!r} has no {{prompt}}: say where the prompt goes.")
        prompter = cls(tokenizer, template)
        prompter.prompt_ids("Why?")
        return prompter

    @cached_property
    def eos(self) -> int:
        """The token that ends a response: see `turn_end`."""
        return turn_end(self.tokenizer, self.template)

    @cached_property
    def control(self) -> ControlTokens:
        """The control tokens that texts might spell."""
        return ControlTokens.of(self.tokenizer, self.template)

    @property
    def vocab_size(self) -> int:
        """Tokens the tokenizer knows; a model's embedding may be padded beyond it."""
        return len(self.tokenizer)

    def prompt_ids(self, prompt: str, options: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of the prompt inside its template, ready for the response's first token.

        Args:
            options: further variables of a chat template.

        Raises:
            UserError: the template has no room for the prompt's turns.
        """
        return self._ids(self._asked(prompt, options))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to the text; together they are the text, special tokens by their names.

        A token may be a part of a character: it adds nothing, and the last part adds the whole.
        """
        backend: Any = self.tokenizer.backend_tokenizer
        stream, texts, waiting = DecodeStream(skip_special_tokens=False), [], []
        for token in tokens:
            waiting.append(token)
            try:
                text = stream.step(backend, token)
            except Exception:  # bytes that are no character: behind them the text begins anew
                text = backend.decode(waiting, skip_special_tokens=False)
                stream = DecodeStream(waiting, skip_special_tokens=False)
            texts.append(text or "")
            waiting = waiting if text is None else []
        if waiting:  # the text ends inside a character
            texts[-1] = backend.decode(waiting, skip_special_tokens=False)
        return texts

    def response_ids(self, prompt: str, response: str, ended: bool = True) -> list[int]:
        """Token ids of a response as the tokenizer spells it behind the prompt, the token that ends it included.

        Args:
            ended: False if the response was cut off and so has no such token.
        """
        prompt_ids = self._asked(prompt)
        if self.template is None and is_dialogue(prompt):  # its turns are stripped, and so is the answer
            response = response.lstrip()
        response = self.control.escape(response)
        before, whole = self._ids(prompt_ids), self._ids(prompt_ids + response)
        # Some tokenizers mark the beginning of a text, so a response is no text of its own; but where its first
        # letters would merge with the prompt's last token, it has to be.
        joined = whole[: len(before)] == before
        ids = whole[len(before) :] if joined else self.control.ids(response)
        return [*ids, *([self.eos] if ended else [])]

    def _asked(self, prompt: str, options: Mapping[str, Any] | None = None) -> str:
        if self.template is None:
            return fill_chat_template(self.tokenizer, turns_of(prompt), True, self.control, options)
        if is_dialogue(prompt) and self.template != "{prompt}":
            raise UserError(
                f"the template {self.template!r} has room for one turn, and a prompt is a dialogue: set the model's "
                "template to null, for the tokenizer's chat template, or to '{prompt}', for the dialogue as it is."
            )
        return self.template.replace("{prompt}", self.control.escape(prompt))

    def _ids(self, text: str) -> list[int]:
        """A template that is a plain text may leave it to the tokenizer to begin it; a response goes on at its end."""
        ids = self.control.ids(text)
        return ids if self.template is None else self.control.begun(ids)

    def spell(self, ids: Sequence[int]) -> str:
        """The text that token ids spell, special tokens and the one that ends a response left out."""
        return str(self.tokenizer.decode([one for one in ids if one != self.eos], skip_special_tokens=True))


def ends_of(prompter: Prompter, config: GenerationConfig | None) -> frozenset[int]:
    """The tokens that end a response: the template's, end-of-sequence, and what the generation config names."""
    ends = None if config is None else config.eos_token_id
    own = prompter.eos, int(prompter.tokenizer.eos_token_id)
    return frozenset([*own, *(ends if isinstance(ends, list) else [] if ends is None else [ends])])
