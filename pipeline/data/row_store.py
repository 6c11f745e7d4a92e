"""The append-only store of finished rows.

It is what survives: DVC deletes a stage's outputs before it runs the stage again, so finished rows live
outside the outputs, keyed by a digest of everything that determines them.
"""

import errno
import fcntl
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from pipeline.config.errors import UserError
from pipeline.data.files import (
    Row,
    replacing,
)

_DIGEST, _ROW = b'{"digest": "', b'", "row": '  # how a line of a row store begins, and what follows its digest


class RowStore:
    """Finished rows by digest, one append-only JSON Lines file that several processes may write to.

    The file outlives experiments and holds the rows of all, so only the rows that are asked for are parsed and kept in
    memory. The rows of one `add` are written with one system call and flushed to the disk, so a killed run loses at
    most what it had not added; a torn last line is dropped when the store is opened again.

    Args:
        path: the file.
        keys: of the rows that will be read or added.
        beside: files of other stores whose rows are known here as well.

    Raises:
        UserError: a line is not a row, or a row that is asked for is damaged.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, keys: Iterable[str], beside: Iterable[Path] = ()) -> None:
        self._path = path
        self._rows: dict[str, Row] = {}
        wanted_keys = _encoded(keys)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as file:
            whole = self._load(path, wanted_keys)
            if whole < os.fstat(file).st_size:
                os.ftruncate(file, whole)
            elif whole > os.fstat(file).st_size:
                _append(file, b"\n", path)
        for other in beside:
            self._load(other, wanted_keys)

    def _load(self, path: Path, wanted_keys: Mapping[bytes, str]) -> int:
        """Take in the rows asked for; return the size of the file's whole lines, line ends included."""
        size = 0
        for number, line in _stored_lines(path):
            key = wanted_keys.get(line[len(_DIGEST) : line.index(_ROW)])
            if key is not None and key not in self._rows:
                try:
                    self._rows[key] = json.loads(line)["row"]
                except ValueError as error:
                    raise _not_a_row(path, number) from error
            size += len(line)
        return size

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
        with _locked(self._path) as file:
            _append(file, "".join(lines).encode(), self._path)
        self._rows |= fresh


def retain(path: Path, keys: Collection[str], delete: bool) -> tuple[int, int]:
    """Keep only the rows of these keys in a store, each once; return how many stay and how many go.

    Args:
        path: the store's file; another takes its place, so that a kill leaves the one or the other.
        keys: of the rows that stay.
        delete: False to count only.

    Raises:
        UserError: a line is not a row.
    """
    left, dropped = _encoded(keys), 0
    with _locked(path), replacing(path) if delete else nullcontext() as kept:
        before = len(left)
        for _, line in _stored_lines(path):
            if left.pop(line[len(_DIGEST) : line.index(_ROW)], None) is None:
                dropped += 1
            elif kept is not None:
                kept.write(line.decode())
    return before - len(left), dropped


def _encoded(keys: Iterable[str]) -> dict[bytes, str]:
    """The keys as they stand in a line."""
    return {json.dumps(key, ensure_ascii=False)[1:-1].encode(): key for key in keys}


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The store's file, open and locked: no other process reads half a line, or takes one being written for torn."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock may have put another file under the name (`retain`): rows added here would be lost.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                yield file
                return
        finally:
            os.close(file)


def _append(file: int, block: bytes, path: Path) -> None:
    start = os.fstat(file).st_size
    if os.write(file, block) < len(block):
        os.ftruncate(file, start)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    os.fsync(file)


def _stored_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of a row store, up to a torn last line; rows themselves are not parsed.

    Raises:
        UserError: a line is not a row.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):  # the last: cut short by a kill, unless only its end is missing
                try:
                    json.loads(line)
                except ValueError:
                    return
                line += b"\n"
            if not (line.startswith(_DIGEST) and _ROW in line and line.endswith(b"}\n")):
                raise _not_a_row(path, number)
            yield number, line


def _not_a_row(path: Path, number: int) -> UserError:
    return UserError(f"{path}, line {number}: not a row of this store: remove the line to regenerate its row.")
