"""Reading text and JSON as they are written, or refusing them; writing a file or a folder whole, or not at all."""

import bz2
import ctypes
import errno
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import platform
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import psutil

from pipeline.config.errors import UserError


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


Row = dict[str, Any]
_HERE, _SWAP = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def digest(value: Any) -> str:
    """Digest of a JSON value (32 hex digits), the same on every machine."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def file_digest(*paths: Path) -> str:
    """Digest of the contents of files, in the order given (32 hex digits)."""
    whole = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "blake2b").digest())
    return whole.hexdigest()


def read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, object) of a JSON Lines file, packed or not, as its lines are read.

    Raises:
        UserError: the file is missing, damaged or empty, or a line before the end is blank, or one is no JSON object.
    """
    row, blank = None, ""
    for number, (where, line) in enumerate(text_lines(path), 1):
        if not line.strip():  # no fault where nothing follows
            blank = blank or where
            continue
        if blank:
            raise UserError(f"{blank}: the line is empty: remove it.")
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: {error}: correct the line.") from error
        if not isinstance(row, dict):
            raise UserError(f'{where}: not a JSON object: write one {{"key": value, …}} per line.')
        yield number, row
    if row is None:
        raise UserError(f"{path} is empty: it needs at least one row.")


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Open a text file that appears under its name only when it is complete (temporary name, then rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with partial.open("w", encoding="utf-8", newline="") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` once it is complete; readers see the old one or the new."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _exchange(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    """A temporary name beside a path that no other process uses; what killed processes of this host left is removed."""
    start = f".{path.name}.{platform.node()}."
    for left in path.parent.glob(f"{glob.escape(start)}*.partial"):
        process = left.name.removeprefix(start).removesuffix(".partial")
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f"{start}{os.getpid()}.partial")


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders at once where the system can (Linux, most local file systems), else by three renames."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is not None and swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _SWAP) == 0:
        return
    aside = one.with_name(f"{one.name}.aside")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON Lines, whole or not at all."""
    with replacing(path) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, indented, whole or not at all."""
    with replacing(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
