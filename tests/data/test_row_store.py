import errno
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from pipeline.config.errors import UserError, guard
from pipeline.data.files import digest, file_digest, read_jsonl, replacing, replacing_folder, write_json, write_jsonl
from pipeline.data.row_store import RowStore
from tests.tiny import ROOT

QUICK = settings(max_examples=50, deadline=None, derandomize=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def reopened(path, keys="abcde"):
    return RowStore(path, keys)


@pytest.fixture
def store_path(tmp_path):
    store = RowStore(tmp_path / "deep" / "store.jsonl", "abc")
    store.add([("a", {"n": 1}), ("b", {"n": 2}), ("c", {"n": 3})])
    return tmp_path / "deep" / "store.jsonl"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"", "the line is empty"),
        (b"   ", "the line is empty"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8"),
        (b"[1, 2]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_a_faulty_line_is_named_by_file_and_number(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 0}\n{"a": 1}\n' + line + b'\n{"a": 3}\n')
    rows = read_jsonl(path)
    assert [next(rows), next(rows)] == [(1, {"a": 0}), (2, {"a": 1})]
    with pytest.raises(UserError) as refused:
        next(rows)
    assert str(refused.value).startswith(f"{path}, line 3: {reason}")


def test_an_empty_file_is_refused_by_name(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(UserError, match=r"rows\.jsonl is empty"):
        list(read_jsonl(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("name", ["absent.jsonl", "."])
def test_a_missing_file_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError) as refused:
        list(read_jsonl(tmp_path / name))
    assert str(refused.value).startswith(f"{tmp_path / name} is missing")


@QUICK
@given(rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=4))
def test_rows_read_back_as_written_whatever_their_text(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, rows)
    assert list(read_jsonl(path)) == list(enumerate(rows, 1))


def test_replacing_shows_the_file_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as stream:
        stream.write("new")
        stream.flush()
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_replacing_keeps_the_old_file_when_the_body_raises(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as stream:
        stream.write("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_never_seen_missing_while_it_is_replaced(tmp_path):
    folder, done, seen = tmp_path / "folder", threading.Event(), set()

    def watch():
        while not done.is_set():
            seen.add((folder / "file").exists())

    watcher = threading.Thread(target=watch)
    for number in range(100):
        with replacing_folder(folder) as partial:
            (partial / "file").write_text(str(number))
        if number == 0:
            watcher.start()
    done.set()
    watcher.join()
    assert seen == {True}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_cannot_be_swapped_at_once_is_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.files.ctypes.CDLL", lambda *args, **options: object())
    for text in ("old", "new"):
        with replacing_folder(tmp_path / "folder") as partial:
            (partial / "file").write_text(text)
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_two_processes_that_replace_one_folder_do_not_meet(tmp_path, monkeypatch):
    with replacing_folder(tmp_path / "folder") as one:
        (one / "file").write_text("one")
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.data.files.os.getpid", os.getppid)
            with replacing_folder(tmp_path / "folder") as other:
                (other / "file").write_text("other")
        assert (one / "file").read_text() == "one"
    assert (tmp_path / "folder" / "file").read_text() == "one"


def test_what_killed_processes_left_is_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    with replacing_folder(tmp_path / "folder") as partial:
        for name in ("folder", "file"):
            left = tmp_path / partial.name.replace(str(os.getpid()), str(ended.pid)).replace("folder", name)
            left.mkdir() if name == "folder" else left.touch()
    with replacing_folder(tmp_path / "folder"), replacing(tmp_path / "file"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


def test_a_row_that_is_no_json_leaves_the_old_file(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "rows.jsonl", [{"a": 2}, {"a": object()}])
    assert lines_of(tmp_path / "rows.jsonl") == ['{"a": 1}']
    assert len(list(tmp_path.iterdir())) == 1


def test_rows_survive_reopening(store_path):
    store = reopened(store_path)
    assert [store[key]["n"] for key in "abc"] == [1, 2, 3]
    assert "d" not in store


def test_rows_added_after_reopening_join_the_old_ones(store_path):
    store = reopened(store_path)
    store.add([("d", {"n": "é\n\u2028 ok"})])
    store = reopened(store_path)
    assert (store["a"], store["d"]) == ({"n": 1}, {"n": "é\n\u2028 ok"})


@pytest.mark.parametrize("torn", ['{"digest": "d", "row": {"n"', '{"digest": "d", "row": {"n": 4}', "\x00\x00"])
def test_a_torn_last_line_is_dropped_and_cut_off(store_path, torn):
    whole = store_path.read_bytes()
    store_path.write_bytes(whole + torn.encode())
    store = reopened(store_path)
    assert "c" in store
    assert "d" not in store
    assert store_path.read_bytes() == whole
    store.add([("e", {"n": 5})])
    assert reopened(store_path)["e"] == {"n": 5}


def test_a_last_row_without_a_line_end_is_kept_and_gets_one(store_path):
    whole = store_path.read_bytes()
    store_path.write_bytes(whole.rstrip(b"\n"))
    store = reopened(store_path)
    assert store["c"] == {"n": 3}
    assert store_path.read_bytes() == whole
    store.add([("d", {"n": 4})])
    assert reopened(store_path)["d"] == {"n": 4}


def test_a_store_that_is_one_torn_line_starts_anew(tmp_path):
    (tmp_path / "store.jsonl").write_text('{"digest"')
    assert "a" not in reopened(tmp_path / "store.jsonl")
    assert (tmp_path / "store.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "line", [b"{broken", b"", b"[1]", b'{"digest": "b"}', b"\xff", b"3", b'{"digest": "b", "row": {"n": }}']
)
def test_a_corrupt_middle_line_is_named_by_number(store_path, line):
    lines = store_path.read_bytes().splitlines()
    store_path.write_bytes(b"\n".join([lines[0], line, lines[2]]) + b"\n")
    with pytest.raises(UserError) as refused:
        reopened(store_path)
    assert str(refused.value).startswith(f"{store_path}, line 2: ")


def test_a_store_holds_only_the_rows_asked_for_however_many_there_are(tmp_path):
    path, text = tmp_path / "store.jsonl", "x" * 900
    with path.open("w") as stream:
        for number in range(20_000):
            stream.write(json.dumps({"digest": f"{number:032x}", "row": {"response": text}}) + "\n")
    tracemalloc.start()
    store = RowStore(path, [f"{number:032x}" for number in (0, 7, 19_999, 20_000)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [f"{number:032x}" in store for number in (0, 1, 7, 19_999, 20_000)] == [True, False, True, True, False]
    assert peak < 2**20  # bytes, of 20 million in the file


@QUICK
@given(key=st.text(), row=st.dictionaries(st.text(), JSON, max_size=3))
def test_a_row_is_found_again_whatever_its_key_and_text(tmp_path_factory, key, row):
    path = tmp_path_factory.mktemp("store") / "store.jsonl"
    RowStore(path, [key]).add([("other", {"digest": key}), (key, row)])
    assert RowStore(path, [key])[key] == ({"digest": key} if key == "other" else row)


def test_rows_go_to_the_file_under_the_name_though_another_was_put_there(store_path):
    store = reopened(store_path)
    write_jsonl(store_path, [{"digest": "b", "row": {"n": 2}}])
    store.add([("d", {"n": 4})])
    assert [key for key in "abcd" if key in reopened(store_path)] == ["b", "d"]


def test_adding_a_known_key_keeps_its_first_row(store_path):
    store = reopened(store_path)
    store.add([("a", {"n": 100}), ("d", {"n": 4})])
    assert store["a"] == reopened(store_path)["a"] == {"n": 1}
    assert len(lines_of(store_path)) == 4


def test_a_key_twice_in_one_call_keeps_its_first_row(tmp_path):
    store = reopened(tmp_path / "store.jsonl")
    store.add([("a", {"n": 1}), ("a", {"n": 2})])
    assert store["a"] == reopened(tmp_path / "store.jsonl")["a"] == {"n": 1}


def test_a_full_disk_raises_and_leaves_a_readable_store(store_path, monkeypatch):
    before, write, store = store_path.read_bytes(), os.write, reopened(store_path)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.row_store.os.write", lambda file, data: write(file, data[: len(data) // 2]))
        with pytest.raises(OSError, match="No space left") as full:
            store.add([("d", {"n": 4}), ("e", {"n": "a longer row, of which only the beginning finds room"})])
    assert full.value.errno == errno.ENOSPC
    assert "d" not in store
    assert "e" not in store
    assert store_path.read_bytes() == before
    store.add([("d", {"n": 5})])
    assert reopened(store_path)["d"] == {"n": 5}


@QUICK
@given(value=st.dictionaries(st.text(), JSON, min_size=2, max_size=5), data=st.data())
def test_a_digest_does_not_depend_on_the_order_of_keys(value, data):
    shuffled = {key: value[key] for key in data.draw(st.permutations(list(value)))}
    assert digest(shuffled) == digest(value)
    assert len(digest(value)) == 32


@QUICK
@given(value=JSON)
def test_a_digest_survives_a_round_trip_through_json(value):
    assert digest(json.loads(json.dumps(value))) == digest(value)


def test_digests_tell_values_apart():
    values = [{}, [], None, 0, "0", [0], {"a": 0}, {"a": [0]}, [1, 2], [2, 1], ["ab", "c"], ["a", "bc"], True, 1.5]
    assert len({digest(value) for value in values}) == len(values)


def test_a_digest_is_the_same_on_every_machine():
    assert digest({"b": [1, 0.5, "é"], "a": None}) == "1fbfb9b21e257a160fcdb22f49280806"


def test_a_file_digest_sees_contents_borders_and_order_not_names(tmp_path):
    paths = {name: tmp_path / name for name in ("ab", "c", "a", "bc", "copy")}
    for name, path in paths.items():
        path.write_text("c" if name == "copy" else name)
    assert file_digest(paths["c"]) == file_digest(paths["copy"])
    assert file_digest(paths["ab"], paths["c"]) != file_digest(paths["a"], paths["bc"])
    assert file_digest(paths["a"], paths["c"]) != file_digest(paths["c"], paths["a"])


def one_sentence(exit_error, *parts):
    message = exit_error.value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert message.endswith(".")
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


@pytest.mark.parametrize(
    ("code", "said"), [(errno.EROFS, "read-only"), (errno.ENOSPC, "disk is full"), (errno.EACCES, "permission denied")]
)
def test_a_file_that_cannot_be_opened_ends_in_one_sentence(tmp_path, monkeypatch, code, said):
    def refuse(self, *_, **__):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SystemExit) as ended, guard():
        write_json(tmp_path / "metrics.json", {})
    one_sentence(ended, tmp_path, said)


@pytest.mark.parametrize(("code", "said"), [(errno.EROFS, "read-only"), (errno.ENOSPC, "disk is full")])
def test_a_store_that_cannot_be_opened_ends_in_one_sentence(tmp_path, monkeypatch, code, said):
    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.row_store.os.open", refuse)
        with pytest.raises(SystemExit) as ended, guard():
            reopened(tmp_path / "store.jsonl")
    one_sentence(ended, tmp_path / "store.jsonl", said)


def test_a_disk_that_fills_up_while_flushing_ends_in_one_sentence_and_keeps_the_old_file(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_json(tmp_path / "metrics.json", 1)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.row_store.os.fsync", refuse)
        with pytest.raises(SystemExit) as ended, guard():
            write_json(tmp_path / "metrics.json", 2)
    one_sentence(ended, "disk is full")
    assert lines_of(tmp_path / "metrics.json") == ["1"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_store_on_a_full_disk_ends_in_one_sentence_that_names_it(store_path, monkeypatch):
    write, store = os.write, reopened(store_path)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.row_store.os.write", lambda file, data: write(file, data[:3]))
        with pytest.raises(SystemExit) as ended, guard():
            store.add([("d", {})])
    one_sentence(ended, store_path, "disk is full")


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "elsewhere/x", None, "models/x"),
    ],
)
def test_a_full_disk_under_weights_ends_in_one_sentence(error):
    with pytest.raises(SystemExit) as ended, guard():
        raise error
    one_sentence(ended, "models/x" if isinstance(error, OSError) else "writing", "disk is full")
    with pytest.raises(SafetensorError), guard():
        raise SafetensorError("Error while deserializing: header too large")


def test_a_user_error_ends_in_its_sentence_and_other_errors_pass_through():
    with pytest.raises(SystemExit) as ended, guard():
        raise UserError("the file is odd: mend it.")
    assert ended.value.code == "error: the file is odd: mend it."
    with pytest.raises(FileNotFoundError), guard():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")
    with pytest.raises(ZeroDivisionError), guard():
        _ = 1 / 0


def test_a_store_knows_the_rows_of_others_beside_it_and_leaves_them_alone(tmp_path, store_path):
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(store_path.read_bytes() + b'{"digest": "half')
    before = torn.read_bytes()
    store = RowStore(tmp_path / "mine.jsonl", ["a", "b", "c", "mine"], [torn])
    assert all(key in store for key in "abc")
    assert torn.read_bytes() == before, "another process may be writing it"
    store.add([("mine", {"text": "x"})])
    assert len((tmp_path / "mine.jsonl").read_text().splitlines()) == 1


WRITER = """
import sys
from pathlib import Path
from pipeline.data.row_store import RowStore
for turn in range(30):
    keys = [f"{sys.argv[2]} {turn} {n}" for n in range(5)]
    RowStore(Path(sys.argv[1]), keys).add([(key, {"text": "x" * 20000}) for key in keys])
"""


def test_processes_that_open_and_write_one_store_lose_nothing(tmp_path):
    path = tmp_path / "store.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=ROOT) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(path.read_text().splitlines()) == 300
    assert len({json.loads(line)["digest"] for line in path.read_text().splitlines()}) == 300
