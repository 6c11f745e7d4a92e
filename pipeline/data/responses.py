"""Responses to prompts: a text as judges read it, and the row that goes from the decoder to the front."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

from pipeline.config.errors import UserError
from pipeline.data.files import Row, read_jsonl, write_jsonl


@dataclass(frozen=True, kw_only=True)
class Response:
    """A text in reply to a prompt, as judges read it."""

    prompt: str
    response: str
    finish: str = "eos"  # eos | stop | length, the last where it was cut off

    @property
    def ended(self) -> bool:
        """Whether it ended by itself, that is with end-of-sequence."""
        return self.finish == "eos"


@dataclass(frozen=True, kw_only=True)
class GeneratedRow(Response):
    """A generated response; log-probabilities are sums over its tokens, in nats."""

    prompt_tokens: int
    tokens: Sequence[int] = ()  # their ids, end-of-sequence included; empty where an evaluation has dropped them
    n_tokens: int
    logp: float  # under the law the tokens were drawn from
    logp_base: float  # under the base at temperature 1
    kl: float  # Σ_t KL(π ‖ π_base), the base at temperature 1
    sample: int  # which of the prompt's responses at this point
    seed: int
    stream: str  # the key of its own random stream
    forwards: int | None = None  # positions computed by any model beyond the prompt; None: as many as lanes × tokens
    drafted: int | None = None  # tokens that a draft proposed; None: nothing drafted
    accepted: int | None = None  # those of them that are in the response
    left_out: float | None = None  # across tokenizers: Σ_t of the base's mass on tokens that no ARM evaluated
    # Where in an experiment it belongs, and what a judge said of it.
    point: str | None = None
    base: str | None = None
    method: str | None = None
    line: str | None = None  # of a comparison: method, point and strength
    scores: Mapping[str, float | None] = field(default_factory=dict)  # per objective; None: undetermined

    def to_json(self) -> Row:
        """The row as a JSON value: scores stand beside its fields, and fields that say nothing are left out."""
        values = ((name, getattr(self, name)) for name in _NAMES)
        return {name: value for name, value in values if value is not None and value != ()} | dict(self.scores)

    @classmethod
    def from_json(cls, row: Row, objectives: Sequence[str] = ()) -> Self:
        """A row from its JSON value, with the scores of these objectives.

        Raises:
            KeyError: a score is missing.
            TypeError: a field is.
        """
        known = {name: row[name] for name in _NAMES if name in row}
        return cls(**known, scores={name: row[name] for name in objectives})


_NAMES = tuple(one.name for one in fields(GeneratedRow) if one.name != "scores")


def read_generated(path: Path, objectives: Sequence[str] = ()) -> Iterator[GeneratedRow]:
    """The rows of a JSON Lines file, with the scores of these objectives.

    Raises:
        UserError: the file is missing or damaged, or a line lacks a field or a score.
    """
    for number, row in read_jsonl(path):
        try:
            yield GeneratedRow.from_json(row, objectives)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a generated row ({error}): run its stage again.") from error


def write_generated(path: Path, rows: Iterable[GeneratedRow]) -> None:
    """Write rows as JSON Lines, whole or not at all."""
    write_jsonl(path, (row.to_json() for row in rows))
