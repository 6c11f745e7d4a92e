"""Text files, packed or not, line by line; and JSON that is read as it is written, or refused."""

import bz2
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from pipeline.config import UserError


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow as pa  # half a second to import, and most files do without

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


# Each opens for reading bytes unless told otherwise.
_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _zstd}
PACKED = ("", *_OPENERS)  # what the name of a text file may end in, behind its kind


def kind_of(path: Path) -> str:
    """The kind of a file by its name, in small letters and without what it is packed with: `.csv` of `Rows.CSV.gz`."""
    name = path.name.lower()
    for packed in _OPENERS:
        name = name.removesuffix(packed)
    return Path(name).suffix


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of a text file, packed or not, as its lines are read; `where` names file and line.

    A mark of the byte order is no part of the text.

    Raises:
        UserError: the file is missing, damaged, or not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: check the path, or run the stage that writes it with `dvc repro`.")
    for number, raw in enumerate(_raw_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            yield where, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8.") from error


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with _OPENERS.get(path.suffix.lower(), partial(open, mode="rb"))(path) as stream:
            yield from stream
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): fetch the file again.") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: why it has none, in a few words: not JSON, a key twice in one object (of which Python would take the
            last), a number of thousands of digits, or nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("lists in lists, too deeply nested to be read") from error


def _integer(digits: str) -> int:
    if len(digits) > sys.int_info.default_max_str_digits:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)} is there twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)
