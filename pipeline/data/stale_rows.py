"""Remove generated rows that no recent run asked for from the row stores.

    python -m pipeline gc                      # make gc: says how many there are
    python -m pipeline gc --days 30 --delete   # make gc FLAGS="--days 30 --delete"

Every run notes the keys that it asks for below scratch/store/asked; rows without a recent note go, those from before
there were notes among them. Which rows a commit would ask for cannot be known without its models and prompts, and need
not be: the rows of a committed experiment are an output, results/generate/rows.jsonl, which DVC's own cache keeps (see
`dvc gc`). A row that is removed costs a later run its generation. Judges' replies, rewards and log-probabilities are
paid for or small, and stay.
"""

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.config.workspace import Workspace
from pipeline.data.files import digest, replacing
from pipeline.data.row_store import retain

_DAY = 86400  # seconds


def note_asked(folder: Path, title: str, keys: Collection[str]) -> None:
    """Note in the folder of the stores that a run asks for these rows of the stores of a title, now.

    Runs that ask for the same rows share a file, whose time is that of the last one.
    """
    file = folder / "asked" / title / f"{digest(sorted(keys))}.txt"
    if file.exists():
        file.touch()
        return
    with replacing(file) as stream:
        stream.writelines(f"{key}\n" for key in keys)


def remove(folder: Path, days: float, delete: bool) -> dict[Path, tuple[int, int]]:
    """Remove the rows that no run of the last days asked for, or only count them.

    Runs may go on meanwhile: they have noted what they ask for, and add to the file that is there when they do.

    Args:
        folder: of the stores.
        days: how long a run counts.
        delete: False to change nothing.

    Returns:
        Per file of rows, how many stay and how many go.

    Raises:
        UserError: a file is not a row store.
    """
    counts, oldest = {}, time.time() - days * _DAY
    for notes in sorted((folder / "asked").glob("*")):
        recent: set[str] = set()
        for note in notes.glob("*.txt"):
            if note.stat().st_mtime >= oldest:
                recent.update(note.read_text(encoding="utf-8").split("\n"))
            elif delete:
                note.unlink()
        whole = folder / f"{notes.name}.jsonl"
        for file in [*([whole] if whole.exists() else []), *sorted(folder.glob(f"{notes.name}.*-of-*.jsonl"))]:
            counts[file] = retain(file, recent, delete)
    return counts


def main(arguments: Sequence[str]) -> None:
    """Say what would go, or let it go."""
    parser = ArgumentParser("python -m pipeline gc", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=float, default=90, help="how long the rows that a run asked for are kept (90)")
    parser.add_argument("--delete", action="store_true", help="remove them")
    options = parser.parse_args(arguments)
    counts = remove(Workspace().scratch / "store", options.days, options.delete)
    for file, (kept, dropped) in counts.items():
        print(f"{file}: {kept} rows stay, {dropped} {'are removed' if options.delete else 'would go'}")
    if not counts:
        print("no run has asked for rows yet: nothing to remove")
    elif not options.delete:
        print("nothing is changed: add --delete (make gc FLAGS=--delete) to remove them")
