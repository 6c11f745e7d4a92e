import os
import time

import pytest

from pipeline.config.errors import UserError
from pipeline.data import stale_rows
from pipeline.data.row_store import RowStore
from pipeline.data.stale_rows import note_asked, remove

DAY = 86400


def keys_in(path):
    return [key for key in "abcdef" if key in RowStore(path, "abcdef")]


@pytest.fixture
def folder(tmp_path):
    """Stores of rows: `a` and `b` were asked for today, `b` and `c` long ago, `d` before keys were noted."""
    folder = tmp_path / "scratch" / "store"
    RowStore(folder / "generate.jsonl", "abcd").add([(key, {"response": f"é {key}"}) for key in "abcd"])
    RowStore(folder / "generate.0-of-2.jsonl", "bc").add([(key, {"response": key}) for key in "bc"])
    RowStore(folder / "verdicts.jsonl", "a").add([("a", {"reply": "A"})])
    note_asked(folder, "generate", "ab")
    note_asked(folder, "generate", "bc")
    [old] = [note for note in (folder / "asked" / "generate").iterdir() if note.read_text() == "b\nc\n"]
    os.utime(old, (time.time() - 100 * DAY,) * 2)
    return folder


def test_rows_that_no_recent_run_asked_for_go_and_the_others_stay(folder):
    counts = remove(folder, days=90, delete=True)
    assert counts == {folder / "generate.jsonl": (2, 2), folder / "generate.0-of-2.jsonl": (1, 1)}
    assert keys_in(folder / "generate.jsonl") == ["a", "b"]
    assert keys_in(folder / "generate.0-of-2.jsonl") == ["b"]
    assert RowStore(folder / "generate.jsonl", "a")["a"] == {"response": "é a"}
    assert keys_in(folder / "verdicts.jsonl") == ["a"], "replies are paid for"
    assert len(list((folder / "asked" / "generate").iterdir())) == 1


def test_asking_again_makes_rows_recent(folder):
    note_asked(folder, "generate", "cb")
    assert remove(folder, days=90, delete=True)[folder / "generate.jsonl"] == (3, 1)


def test_without_delete_nothing_changes(folder, monkeypatch, capsys):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    monkeypatch.chdir(folder.parents[1])
    stale_rows.main([])
    assert "generate.jsonl: 2 rows stay, 2 would go" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    stale_rows.main(["--days", "200", "--delete"])
    assert "generate.jsonl: 3 rows stay, 1 are removed" in capsys.readouterr().out


def test_a_run_that_goes_on_meanwhile_loses_nothing(folder):
    note_asked(folder, "generate", "ef")
    running = RowStore(folder / "generate.jsonl", "ef")
    running.add([("e", {"response": "e"})])
    remove(folder, days=90, delete=True)
    running.add([("f", {"response": "f"})])
    assert keys_in(folder / "generate.jsonl") == ["a", "b", "e", "f"]


def test_a_file_that_is_not_a_store_is_named_and_left(folder):
    file = folder / "generate.jsonl"
    file.write_bytes(damaged := b"{broken\n" + file.read_bytes())
    with pytest.raises(UserError, match=r"generate\.jsonl, line 1: not a row of this store"):
        remove(folder, days=90, delete=True)
    assert file.read_bytes() == damaged
