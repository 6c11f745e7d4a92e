"""Where rows come from: files of JSON Lines, JSON, Parquet or CSV, alone or in a folder, read as they come.

A dataset of the Hub is downloaded into such a folder first, so that all data are files that DVC can compare.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pipeline.config import UserError
from pipeline.params import Data, Download
from pipeline.preferences import SPLITS
from pipeline.store import JSONL, Row, read_jsonl, replacing_folder, write_json

_BUILDERS = {".json": "json", ".csv": "csv"}  # of `datasets`
_READ = (*JSONL, ".parquet", *_BUILDERS)
_BATCH = 1000  # rows of a Parquet file held at once


def download(wanted: Download) -> None:
    """Put the files of a dataset repository at its revision into its folder, with the commit that this was.

    Raises:
        UserError: it could not be downloaded, or holds no file that can be read.
    """
    patterns = list(wanted.files) or [f"**{suffix}" for suffix in _READ]
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


def _listed(folder: Path, pattern: str) -> list[Path]:
    found = sorted(file for file in folder.glob(pattern or "**/*") if file.name.endswith(_READ))
    if found := [file for file in found if file.name != "origin.json"]:
        return found
    raise UserError(f"{folder} has no file {pattern or '*'} that ends in {', '.join(_READ)}: correct the path.")


def read(path: Path) -> Iterator[tuple[str, Row]]:
    """(where, row) of a file one after another, never all at once; `where` names file and line (or row).

    Raises:
        UserError: the file is missing, empty, or of another kind, or a line is malformed.
    """
    if path.name.endswith(JSONL):
        for number, row in read_jsonl(path):
            yield f"{path}, line {number}", row
        return
    if not path.is_file():
        raise UserError(f"{path} is missing: correct data.path.")
    if not path.name.endswith(_READ):
        raise UserError(f"{path} is of no kind that can be read: use one of {', '.join(_READ)}.")
    number = 0
    try:
        for number, row in enumerate(_parquet(path) if path.suffix == ".parquet" else _built(path), 1):
            yield f"{path}, row {number}", row
    except (ValueError, OSError) as error:  # pyarrow's and pandas' are of these kinds
        raise UserError(f"{path}, behind row {number}: {str(error).splitlines()[0]}: correct the file.") from error
    if number == 0:
        raise UserError(f"{path} is empty: it needs at least one row.")


def _parquet(path: Path) -> Iterator[Row]:
    """Rows by pyarrow, whose memory stays small; `datasets` held five times the file."""
    with pq.ParquetFile(path, memory_map=True) as file:
        for batch in file.iter_batches(_BATCH):
            yield from batch.to_pylist()


def _built(path: Path) -> Iterator[Row]:
    from datasets import load_dataset  # seconds to import, and most files do without
    from datasets.exceptions import DatasetGenerationError

    try:
        yield from load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True)
    except DatasetGenerationError as error:
        raise ValueError(str(error.__cause__ or error)) from error
