"""Formats of responses (JSON schemas, regular expressions, choices, grammars) on the guided law, inside vLLM.

vLLM takes forbidden tokens out of the logits of each row before processors see them. Here the logits of several rows
are summed, and the base's own law is needed whole, for the KL to it: so the processor follows a group's grammar itself
and applies it to the sum, with the matcher that vLLM uses too, xgrammar's.

Shapes: G groups, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import xgrammar
from torch import Tensor
from vllm.config import VllmConfig
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend


def token_info(config: VllmConfig) -> xgrammar.TokenizerInfo:
    """The base's vocabulary as vLLM describes it to xgrammar; grammars fit only the one they were compiled for."""
    tokenizer, size = cached_tokenizer_from_config(config.model_config), config.model_config.get_vocab_size()
    backend = XgrammarBackend(config, tokenizer=tokenizer, vocab_size=size)
    return backend.compile_grammar(StructuredOutputOptions.REGEX, "a").ctx.tokenizer_info  # which it keeps to itself


class Matcher:
    """Follows a response along its grammar.

    Args:
        grammar: as `GrammarCompiler.compile` returns it.
        tokens: the vocabulary.
        ends: tokens that end a response, which may be drawn where the format is complete.
    """

    def __init__(self, grammar: str, tokens: xgrammar.TokenizerInfo, ends: Sequence[int]) -> None:
        compiled = xgrammar.CompiledGrammar.deserialize_json(grammar, tokens)
        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(ends))
        self._accepted = 0

    def fill(self, response: Sequence[int], bitmask: Tensor, place: int) -> None:
        """Write which tokens may follow a response, which has grown since the last time, into a row of a bitmask."""
        for token in response[self._accepted :]:
            self._matcher.accept_token(token)
            self._accepted += 1
        self._matcher.fill_next_token_bitmask(bitmask, place)


class Grammars:
    """The grammars that a processor follows.

    Args:
        config: vLLM's.
    """

    def __init__(self, config: VllmConfig) -> None:
        self._config = config

    @cached_property
    def _tokens(self) -> xgrammar.TokenizerInfo:
        return token_info(self._config)

    def matcher(self, grammar: str, ends: Sequence[int]) -> Matcher:
        """Follow a response from its beginning."""
        return Matcher(grammar, self._tokens, ends)

    def mask(self, matchers: Mapping[int, tuple[Matcher, Sequence[int]]], logits_GV: Tensor) -> None:
        """Take out what grammars forbid.

        Args:
            matchers: of the groups that have a grammar, by their place, each with the response so far.
            logits_GV: the sums of all groups, changed in place.
        """
        if not matchers:
            return
        bitmask = xgrammar.allocate_token_bitmask(len(logits_GV), self._config.model_config.get_vocab_size())
        for place, (matcher, response) in matchers.items():
            matcher.fill(response, bitmask, place)
        xgrammar.apply_token_bitmask_inplace(
            logits_GV, bitmask.to(logits_GV.device), vocab_size=logits_GV.shape[1], indices=list(matchers)
        )
