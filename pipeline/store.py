"""Rows on disk: JSON Lines read with line numbers, files written whole or not at all, and the append-only store.

The store is what survives: DVC deletes a stage's outputs before it runs the stage again, so finished rows live
outside the outputs, keyed by a digest of everything that determines them.
"""

import bz2
import ctypes
import errno
import fcntl
import glob
import gzip
import hashlib
import json
import lzma
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from pipeline.config import UserError

Row = dict[str, Any]

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
JSONL = (".jsonl", *(f".jsonl{packed}" for packed in _OPENERS))
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
        UserError: the file is missing or empty, or a line is blank, not UTF-8, or not a JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: check the path, or run the stage that writes it with `dvc repro`.")
    number = 0
    with _OPENERS.get(path.suffix, open)(path, "rb") as stream:
        for number, raw in enumerate(_unpacked(stream, path), 1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8.") from error
            if not line.strip():
                raise UserError(f"{where}: the line is empty: remove it.")
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}): correct the line.") from error
            if not isinstance(row, dict):
                raise UserError(f'{where}: not a JSON object: write one {{"key": value, …}} per line.')
            yield number, row
    if number == 0:
        raise UserError(f"{path} is empty: it needs at least one row.")


def _unpacked(stream: Iterable[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from stream
    except (EOFError, lzma.LZMAError, OSError) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): fetch the file again.") from error


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


def _is_row(line: bytes) -> bool:
    try:
        return {"digest", "row"} <= set(json.loads(line))
    except (ValueError, TypeError):
        return False


class RowStore:
    """Finished rows by digest, one append-only JSON Lines file that several processes may write to.

    The rows of one `add` are written with one system call and flushed to the disk, so a killed run loses at most what
    it had not added; a torn last line is dropped when the store is opened again, a whole one without its line end kept.

    Args:
        path: the file.
        beside: files of other stores whose rows are known here as well.
    """

    def __init__(self, path: Path, beside: Iterable[Path] = ()) -> None:
        self._path = path
        self._rows: dict[str, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            with self._locked():
                content = path.read_bytes()
                whole = self._load(path, content)
                if whole < len(content):
                    os.ftruncate(self._file, whole)
                elif content and not content.endswith(b"\n"):
                    os.write(self._file, b"\n")
            for other in beside:
                self._load(other, other.read_bytes())
        except BaseException:
            os.close(self._file)
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process reads half a line, or takes a line that is being written for a torn one."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _load(self, path: Path, content: bytes) -> int:
        """Know the rows of a file; return how many bytes of it are whole rows, the last with or without a line end."""
        whole, last = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
        if _is_row(last):
            whole = content
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._rows.setdefault(entry["digest"], entry["row"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: not a row of this store: remove the line to regenerate its row."
                ) from error
        return len(whole)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Row:
        return self._rows[key]

    def add(self, rows: Iterable[tuple[str, Row]]) -> None:
        """Append finished rows, together or not at all; a key already present keeps its first row.

        Raises:
            OSError: the disk is full; the file is as it was before.
        """
        fresh: dict[str, Row] = {}
        for key, row in rows:
            if key not in self._rows:
                fresh.setdefault(key, row)
        lines = [json.dumps({"digest": key, "row": row}, ensure_ascii=False) + "\n" for key, row in fresh.items()]
        block = "".join(lines).encode()
        with self._locked():
            start = os.fstat(self._file).st_size
            if os.write(self._file, block) < len(block):
                os.ftruncate(self._file, start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            os.fsync(self._file)
        self._rows |= fresh

    def close(self) -> None:
        """Close the file; the rows stay readable."""
        os.close(self._file)
