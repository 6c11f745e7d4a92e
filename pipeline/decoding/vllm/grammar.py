"""Formats of responses (JSON schemas, regular expressions, choices, grammars) on the guided law.

vLLM takes forbidden tokens out of the logits of each row before processors see them. Here the logits of several rows
are summed, and the base's own law is needed whole, for the KL to it: so the processor follows a group's grammar itself
and applies it to the sum. Compiler and matcher are the ones that vLLM uses, xgrammar's. Grammars are compiled where
requests are read: inside the engine everybody would wait for that.

Shapes: G groups, V vocabulary.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import xgrammar
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
from vllm.v1.structured_output.request import get_structured_output_key

from pipeline.config.errors import UserError

_LONGEST = 10.0  # seconds that a compilation may take


def _backend(config: VllmConfig) -> XgrammarBackend:
    """VLLM's compiler for the vocabulary of the base."""
    tokenizer = cached_tokenizer_from_config(model_config=config.model_config)
    return XgrammarBackend(config, tokenizer=tokenizer, vocab_size=config.model_config.get_vocab_size())


class GrammarCompiler:
    """Compiles the formats of requests, one after the other.

    Args:
        config: vLLM's.
    """

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self._pool = ThreadPoolExecutor(1)  # a compilation cannot be interrupted, and hostile ones must not pile up

    async def compile(self, structured: StructuredOutputsParams) -> str:
        """The compiled format as JSON, which any process with the same tokenizer can read.

        Raises:
            UserError: it cannot be compiled, that takes too long, or no text has this format.
        """
        if structured._backend != "xgrammar":
            raise UserError("the format uses something that xgrammar does not know: simplify it.")
        compilation = asyncio.get_running_loop().run_in_executor(self._pool, self._compiled, structured)
        try:
            return await asyncio.wait_for(compilation, _LONGEST)
        except TimeoutError as error:
            raise UserError(f"the format takes more than {_LONGEST:g} seconds to compile: simplify it.") from error
        except (RuntimeError, ValueError) as error:  # xgrammar's own are of these kinds
            raise UserError(f"the format cannot be compiled: {error}") from error

    @cached_property
    def _compiler(self) -> XgrammarBackend:
        return _backend(self._config)

    def _compiled(self, structured: StructuredOutputsParams) -> str:
        grammar = self._compiler.compile_grammar(*get_structured_output_key(structured))
        bitmask = self._compiler.allocate_token_bitmask(1)
        grammar.fill_bitmask(bitmask, 0)
        if not bitmask.any():
            raise UserError("the format allows no text at all: correct it.")
        return str(grammar.ctx.serialize_json())


class Matcher:
    """Follows a response along its grammar.

    Args:
        grammar: as `GrammarCompiler.compile` returns it.
        tokens: what xgrammar knows of the tokenizer.
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
        any_grammar = _backend(self._config).compile_grammar(StructuredOutputOptions.REGEX, "a")
        return any_grammar.ctx.tokenizer_info

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
