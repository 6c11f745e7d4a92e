"""Compiling the formats of requests in a process of its own.

What a client writes can take hours to compile, or all memory, and the engine or the server would go down with it. So
one process compiles for all requests, within bounds; it is killed where it exceeds them, and started again when needed.
That process runs this module, and answers each line of JSON with a line.
"""

import asyncio
import json
import resource
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from typing import Any

import xgrammar

_SECONDS = 10.0  # that a compilation may take
_START = 120.0  # and the start of the process
_MEMORY = 4 * 2**30  # bytes of its address space
_LARGEST = 4 * 2**20  # characters of a compiled format, which travels to the engine with its request


class FormatError(ValueError):
    """A format that cannot be had, said in a sentence."""


class GrammarCompiler:
    """Compiles formats, one after the other.

    Args:
        tokens: returns the vocabulary that grammars are for; called when the process starts.
    """

    def __init__(self, tokens: Callable[[], xgrammar.TokenizerInfo]) -> None:
        self._tokens, self._turn = tokens, asyncio.Lock()
        self._process: Process | None = None

    async def compile(self, kind: str, text: str) -> str:
        """The compiled format as JSON, which any process with the same vocabulary can read.

        Args:
            kind: json, regex, grammar, lark or structural_tag.
            text: the schema, the expression, the grammar.

        Raises:
            FormatError: it cannot be compiled within the bounds, or no text has this format.
        """
        async with self._turn:
            try:
                process = self._process = self._process or await self._started()
                reply = await asyncio.wait_for(_ask(process, {"kind": kind, "text": text}), _SECONDS)
            except (TimeoutError, OSError, ValueError) as error:
                self.close()
                raise FormatError(
                    f"the format takes more than {_SECONDS:g} seconds or too much memory to compile: simplify it."
                ) from error
            except asyncio.CancelledError:  # the client left, and the reply would be taken for the next one's
                self.close()
                raise
        if "error" in reply:
            raise FormatError(str(reply["error"]))
        return str(reply["grammar"])

    async def _started(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, stdin=PIPE, stdout=PIPE, limit=2 * _LARGEST
        )
        await asyncio.wait_for(_ask(process, {"tokens": self._tokens().serialize_json()}), _START)
        return process

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None


async def _ask(process: Process, question: dict[str, Any]) -> dict[str, Any]:
    """A line of the process in reply to one.

    Raises:
        ValueError: it has none, since it ended.
    """
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(question).encode() + b"\n")
    await process.stdin.drain()
    reply: dict[str, Any] = json.loads(await process.stdout.readline())
    return reply


def compiled(compiler: xgrammar.GrammarCompiler, tokens: xgrammar.TokenizerInfo, kind: str, text: str) -> str:
    """A format as JSON.

    Raises:
        FormatError: no text has it, or it is too large.
        RuntimeError: xgrammar's, of what it cannot compile.
    """
    ways = {
        "json": compiler.compile_json_schema,
        "regex": compiler.compile_regex,
        "grammar": compiler.compile_grammar,
        "lark": compiler.compile_lark,
        "structural_tag": compiler.compile_structural_tag,
    }
    grammar = ways[kind](text)
    bitmask = xgrammar.allocate_token_bitmask(1, tokens.vocab_size)
    xgrammar.GrammarMatcher(grammar).fill_next_token_bitmask(bitmask)
    if not bitmask.any():
        raise FormatError("the format allows no text at all: correct it.")
    if len(serialized := str(grammar.serialize_json())) > _LARGEST:
        raise FormatError("the format is too large: simplify it.")
    return serialized


def main() -> None:
    """Answer line by line, the vocabulary first."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    tokens = xgrammar.TokenizerInfo.deserialize_json(json.loads(sys.stdin.readline())["tokens"])
    compiler = xgrammar.GrammarCompiler(tokens, max_threads=1, cache_enabled=False)
    print("{}", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            reply = {"grammar": compiled(compiler, tokens, question["kind"], question["text"])}
        except FormatError as error:
            reply = {"error": str(error)}
        except Exception as error:  # of C++, whose kinds are many
            reply = {"error": f"the format cannot be compiled: {' '.join(str(error).split())}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
