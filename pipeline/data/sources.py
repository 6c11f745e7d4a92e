"""Where rows come from: files of JSON Lines, JSON, Parquet, CSV or TSV, alone or in a folder, read as they come.

A dataset of the Hub is downloaded into such a folder first, so that all data are files that DVC can compare.
"""

import csv
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pipeline.config.errors import UserError
from pipeline.config.schema import Data, Download
from pipeline.data.files import PACKED, Row, kind_of, parse_json, read_jsonl, replacing_folder, text_lines, write_json
from pipeline.data.splits import SPLITS

_BATCH = 1000  # rows of a Parquet file held at once
_ABOUT = {"origin.json", "dataset_info.json", "dataset_infos.json", "state.json"}  # what a dataset is, not its rows


def download(wanted: Download) -> None:
    """Put the files of a dataset repository at its revision into its folder, with the commit that this was.

    Raises:
        UserError: it could not be downloaded, or holds no file that can be read.
    """
    endings = [kind + packed for kind in _READERS for packed in PACKED]
    patterns = list(wanted.files) or [f"**{ending}" for lower in endings for ending in (lower, lower.upper())]
    with replacing_folder(Path(wanted.folder)) as partial:
        try:
            commit = HfApi().dataset_info(wanted.repository, revision=wanted.revision).sha
            snapshot_download(
                wanted.repository, repo_type="dataset", revision=commit, local_dir=partial, allow_patterns=patterns
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"the dataset {wanted.repository} at revision {wanted.revision} could not be downloaded "
                f"({str(error).splitlines()[0]}): check the name, the network, and HF_TOKEN for gated ones, or say "
                "data.download=[] data.path=… of a folder that has its files."
            ) from error
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        _listed(partial, "")
        write_json(partial / "origin.json", {"repository": wanted.repository, "revision": commit})


def files_of(data: Data) -> list[tuple[str | None, Path]]:
    """The files to read with the split that each holds (None: it holds several, or does not say).

    Raises:
        UserError: there is no file of a kind that can be read.
    """
    path = Path(data.path)
    if path.is_dir():
        if not data.files:
            return [(None, file) for file in _listed(path, "")]
        return [(split, file) for split in SPLITS if split in data.files for file in _listed(path, data.files[split])]
    if data.files:
        raise UserError(f"data.files names files in a folder, but data.path {path} is none: correct one of them.")
    return [(None, path)]


def passed_over(data: Data) -> list[str]:
    """The files of the folder `data.path` that are of no kind that can be read, so that nobody takes them for read."""
    folder = Path(data.path)
    matched = {file for pattern in data.files.values() or [""] for file in _visible(folder, pattern)}
    return sorted(str(file.relative_to(folder)) for file in matched if kind_of(file) not in _READERS)


def _visible(folder: Path, pattern: str) -> list[Path]:
    """The files that hold rows or may: neither hidden ones (also of a hidden folder) nor those about the dataset."""
    return sorted(
        file
        for file in folder.glob(pattern or "**/*")
        if file.is_file()
        and file.name not in _ABOUT
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _listed(folder: Path, pattern: str) -> list[Path]:
    if listed := [file for file in _visible(folder, pattern) if kind_of(file) in _READERS]:
        return listed
    raise UserError(f"{folder} has no file {pattern or '*'} that ends in {', '.join(_READERS)}: correct the path.")


def read(path: Path) -> Iterator[tuple[str, Row]]:
    """(where, row) of a file one after another; `where` names file and line (or row).

    Only of JSON that is one list the whole text is held in memory.

    Raises:
        UserError: the file is missing, empty, damaged, or of another kind, or a line is malformed.
    """
    kind, number = kind_of(path), 0
    if not path.is_file():
        raise UserError(f"{path} is missing: correct data.path.")
    if kind not in _READERS:
        raise UserError(f"{path} is of no kind that can be read: use one of {', '.join(_READERS)}.")
    unit = "line" if _READERS[kind] is _json_lines else "row"
    try:
        for number, row in enumerate(_READERS[kind](path), 1):
            yield f"{path}, {unit} {number}", row
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pyarrow's and csv's, of a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}, behind row {number}: {reason}: correct the file.") from error
    if number == 0:
        raise UserError(f"{path} is empty: it needs at least one row.")


def _json_lines(path: Path) -> Iterator[Row]:
    return (row for _, row in read_jsonl(path))


def _json(path: Path) -> Iterator[Row]:
    """Of one list of objects; or of JSON Lines, which the Hub has under this name as well."""
    first = next((line for _, line in text_lines(path) if line.strip()), "{}")
    try:
        by_line = first.lstrip().startswith("{") and isinstance(parse_json(first), dict)
    except ValueError:  # an object over several lines
        by_line = False
    if by_line:
        yield from _json_lines(path)
        return
    rows = parse_json("".join(line for _, line in text_lines(path)))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("neither a list of objects nor an object per line")
    yield from rows


def _parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path, memory_map=True) as file:
        _unique(file.schema_arrow.names)
        for batch in file.iter_batches(_BATCH):
            columns = [_values(name, batch.column(name)) for name in batch.schema.names]
            yield from (dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True))


def _values(name: str, column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except Exception as error:  # what Python has for a date beyond its years: OverflowError, KeyError, …
        raise ValueError(f"column {name}: {error}") from error


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    """All texts as they stand: no word means a missing value, digits are no numbers, and an empty field is None."""
    csv.field_size_limit(sys.maxsize)  # of the module, and a text may be long
    lines = csv.reader((line for _, line in text_lines(path)), delimiter=delimiter, strict=True)
    header = _unique(next(lines, []))
    for values in filter(None, lines):  # an empty line is no row
        if len(values) != len(header):
            raise ValueError(f"{len(values)} fields, but {len(header)} columns")
        yield {name: value or None for name, value in zip(header, values, strict=True)}


def _unique(columns: list[str]) -> list[str]:
    if twice := {name for name in columns if columns.count(name) > 1}:
        raise ValueError(f"the column {min(twice)} is there twice")
    return columns


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": lambda path: _table(path, ","),
    ".tsv": lambda path: _table(path, "\t"),
}
