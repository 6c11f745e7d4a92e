"""What values of options may be: bounded numbers, names, sentences; and the base of all sections."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field


def spelled(pattern: str, rule: str) -> AfterValidator:
    """A text of that pattern; `rule` says so in the refusal."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(rule)
        return text

    return AfterValidator(check)


def without_nulls(entries: Any) -> Any:
    """The entries that have a value: groups show all there can be, with null, so that each can be set by its name."""
    return {key: value for key, value in entries.items() if value is not None} if isinstance(entries, dict) else entries


Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Several = Annotated[int, Field(ge=2, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
# Names become folders, cells of tables (which read some words as numbers or as missing), keys that DVC splits at dots,
# and words of commands.
Name = Annotated[
    str,
    spelled(
        r"(?!(?i:nan|na|null|none|true|false|inf|infinity)$)[A-Za-z][A-Za-z0-9_-]{0,63}",
        "a name starts with a letter, goes on with up to 63 letters, digits, _ and -, and is not a word that tables "
        "read as a value, such as nan or none",
    ),
]
Device = Annotated[str, spelled(r"auto|cpu|gpu|cuda(:\d{1,3})?|mps", "use auto, cpu, gpu, cuda or, of several, cuda:1")]
Targets = Annotated[
    str,
    spelled(
        r"all-linear|(?!.*(lm_head|embed|wte|wpe))[A-Za-z_][\w.]*(,[A-Za-z_][\w.]*)*",
        "name linear layers of the blocks, as in q_proj,v_proj, or use all-linear; the head and the embeddings stay as "
        "the base has them",
    ),
]
Share = Annotated[float, Field(gt=0, lt=1)]
Sentence = Annotated[str, spelled(r"(?s).*\S.*", "write a sentence that tells the model how to answer")]
Split = Literal["train", "validation", "test"]
Column = Literal[
    "id", "split", "system", "prompt", "response_0", "response_1", "ended_0", "ended_1", "chosen", "rejected",
    "chosen_ended", "rejected_ended", "objective", "score_chosen", "score_rejected",
]  # fmt: skip


class Strict:
    """Keys that no field carries are refused, and so are numbers that are none: NaN and the infinities."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
