import bz2
import gzip
import json
import lzma
import random
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.config.errors import UserError
from pipeline.config.schema import Data, Download, Objective
from pipeline.data import sources
from pipeline.data.card import DataCard
from pipeline.data.preferences import Prompts, read_rows
from pipeline.stages import prepare
from tests import schemas

HUMAN = {"human": Objective(label="human")}
PKU = {"helpful": Objective(label="better_response_id"), "harmless": Objective(label="safer_response_id")}
DIALOGUE = "\n\nHuman: Hello.\n\nAssistant: Hello, what is it?\n\nHuman: What is thing 0 of {} like?\n\nAssistant:"


def rows_of(data, objectives=HUMAN):
    card = DataCard(objectives)
    found = list(read_rows(data, objectives, 0, card))
    return found, {reason: count["rows"] for reason, count in card.summary()["dropped"].items()}


@pytest.fixture
def published(tmp_path, compose_params):
    """The data section of a dataset's config, on files of its schema in a local folder."""

    def run(name):
        schemas.WRITERS[name](tmp_path / name)
        return compose_params(
            f"data={name}", "objectives=scored", "data.download=[]", f"data.path={tmp_path / name}"
        ).data

    return run


@pytest.mark.parametrize(("name", "count"), [("full_hh_rlhf", 60), ("hh_rlhf", 120), ("ultrafeedback_binarized", 60)])
def test_published_splits_are_kept_and_validation_is_drawn_from_train(published, name, count):
    rows, dropped = rows_of(published(name))
    assert (len(rows), dropped) == (count, {})
    assert {row["split"] for row in rows} >= {"train", "test"}
    seeds = {row["split"]: set() for row in rows}
    for row in rows:
        seeds[row["split"]].add(row["prompt"].split(" of ")[1][0])
    assert seeds["test"].isdisjoint(seeds["train"] | seeds.get("validation", set()))
    assert len({row["id"] for row in rows}) == count


@pytest.mark.parametrize(("name", "seed"), [("full_hh_rlhf", 0), ("hh_rlhf", 1)])
def test_dialogues_keep_their_earlier_turns_in_the_prompt(published, name, seed):
    first = next(row for row in rows_of(published(name))[0] if "thing 0 of" in row["prompt"] and row["split"] != "test")
    assert first["prompt"] == DIALOGUE.format(seed)
    assert first["response_0"].startswith(" It is ") and first["response_1"].endswith(", so.")
    assert first["human"] == 0


def test_lists_of_messages_become_prompt_and_responses_and_equal_scores_a_tie(published):
    rows, _ = rows_of(published("ultrafeedback_binarized"))
    assert rows[0]["prompt"] == "What is thing 0 of 0 like?"
    assert [row["human"] for row in rows].count(None) == 2
    assert all("so." in row["response_1"] for row in rows)


def test_one_row_of_pku_saferlhf_carries_two_objectives(published):
    rows, _ = rows_of(published("pku_saferlhf_10k"), PKU)
    assert len(rows) == 80
    raw = pd.read_parquet(published("pku_saferlhf_10k").path)
    assert [row["better_response_id"] for row in rows] == raw["better_response_id"].tolist()
    card = DataCard(PKU)
    for row in rows:
        card.keep(row, dict.fromkeys(PKU))
    differ = (raw["better_response_id"] != raw["safer_response_id"]).mean()
    assert card.summary()["conflicts"] == {"helpful, harmless": {"rows": 80, "rate": round(differ, 4)}}


EXPLICIT = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
TOLD = {"role": "user", "content": "What color is the sky?"}
BLUE, GREEN = ({"role": "assistant", "content": f"It is {color}."} for color in ("blue", "green"))
FORMATS = {
    "explicit": EXPLICIT,
    "implicit": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "conversational explicit": {"prompt": [TOLD], "chosen": [BLUE], "rejected": [GREEN]},
    "conversational implicit": {"chosen": [TOLD, BLUE], "rejected": [TOLD, GREEN]},
}


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}


def stored(rows, path):
    name = path.name.lower()
    packed = next(ending for ending in sorted(PACKERS, reverse=True) if name.endswith(ending))
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(path)
        return Data(path=str(path), sampler="", prompts=str(path))
    match Path(name.removesuffix(packed)).suffix:
        case ".json":
            text = json.dumps(rows)
        case ".csv":
            text = pd.DataFrame(rows).to_csv(index=False)
        case ".tsv":
            text = pd.DataFrame(rows).to_csv(index=False, sep="\t")
        case _:
            text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(PACKERS[packed](text.encode()))
    return Data(path=str(path), sampler="", prompts=str(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson.zst", ".JSONL.xz", ".json", ".Json.bz2", ".parquet"])
@pytest.mark.parametrize("form", FORMATS)
def test_the_preference_formats_of_trl_are_read_from_any_file(tmp_path, form, suffix):
    rows, _ = rows_of(stored([FORMATS[form]], tmp_path / f"rows{suffix}"))
    texts = ("The sky is", " blue.", " green.")
    spoken = (TOLD["content"], "It is blue.", "It is green.")
    expected = spoken if "conversational" in form else texts
    assert tuple(rows[0][key] for key in ("prompt", "response_0", "response_1")) == expected


def test_csv_with_ties_and_other_names_of_columns(tmp_path):
    rows = [
        {"question": f"{n}?", "a": "yes", "b": "no", "better_response_id": label}
        for n, label in enumerate((0, 1, None))
    ]
    data = stored(rows, tmp_path / "mine.csv")
    named = Data(data.path, "", data.path, columns={"prompt": "question", "response_0": "a", "response_1": "b"})
    found, _ = rows_of(named, {"helpful": PKU["helpful"]})
    assert [(row["prompt"], row["better_response_id"]) for row in found] == [("0?", 0), ("1?", 1), ("2?", None)]
    with pytest.raises(UserError, match=r"mine\.csv, row 1: no column prompt, only question, a, b"):
        rows_of(data, {"helpful": PKU["helpful"]})


def test_a_whole_folder_is_read_where_no_file_is_named(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        stored([{"prompt": f"{name}?", "chosen": "x", "rejected": "y", "id": name}], tmp_path / name)
    assert [row["id"] for row in rows_of(Data(str(tmp_path), "", str(tmp_path)))[0]] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
def test_a_folder_is_read_whatever_its_files_are_called_and_packed_with(tmp_path, kind, packed):
    shown = stored([EXPLICIT], tmp_path / f"Rows{(kind + packed).upper()}")
    assert [row["prompt"] for row in rows_of(shown)[0]] == ["The sky is"]
    for name in (".hidden.jsonl", ".cache/rows.jsonl", "dataset_infos.json", "deep/dataset_info.json", "origin.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"default": {"description": ""}}')
    for name in ("README.md", "deep/rows.lz4"):
        (tmp_path / name).write_text("x")
    folder = Data(str(tmp_path), "", str(tmp_path))
    assert [row["prompt"] for row in rows_of(folder)[0]] == ["The sky is"]
    assert sources.passed_over(folder) == ["README.md", "deep/rows.lz4"]
    assert sources.passed_over(Data(str(tmp_path), "", "", files={"train": "**/rows*"})) == ["deep/rows.lz4"]
    assert sources.passed_over(shown) == []


def test_the_data_card_names_the_files_of_a_folder_that_were_not_read(
    tmp_path, compose_params, workspace, capsys, tiny
):
    workspace.models.mkdir()
    (workspace.models / "smollm2-135m").symlink_to(tiny)  # whose control tokens the card counts
    tmp_path = tmp_path / "data"
    tmp_path.mkdir()
    for split in ("train", "validation", "test"):
        stored([EXPLICIT | {"prompt": split, "split": split, "chosen_ended": False}], tmp_path / f"{split}.csv.gz")
    (tmp_path / "more.lz4").write_text("x")
    own = ("data=own", f"data.path={tmp_path}", "objectives=human_preference", "sweep=human_preference")
    prepare.run(compose_params(*own), workspace)
    folder = workspace.results / "prepare"
    assert json.loads((folder / "data_card.json").read_text())["files not read"] == ["more.lz4"]
    assert "passed over: more.lz4" in capsys.readouterr().out
    pairs = (folder / "pairs" / "human_preference.jsonl").read_text().splitlines()
    assert [json.loads(pair)["chosen_ended"] for pair in pairs] == [False] * 3


@pytest.mark.parametrize("suffix", [".csv", ".tsv.gz", ".json", ".jsonl"])
def test_words_and_digits_are_texts(tmp_path, suffix):
    words = ["NA", "None", "null", "nan", "n/a", "1", "007", "1e5", "2020-01-01", "99999999999999999999", "true"]
    rows = [{"prompt": word, "chosen": f"{word} ", "rejected": "x"} for word in words]
    found, dropped = rows_of(stored(rows, tmp_path / f"rows{suffix}"))
    assert ([row["prompt"] for row in found], dropped) == (words, {})
    assert [row["response_0"] for row in found] == [f"{word} " for word in words]


def test_an_empty_prompt_of_a_table_is_none(tmp_path):
    rows = [{"prompt": None, "chosen": "I like dogs.", "rejected": "I like cats."}]
    assert rows_of(stored(rows, tmp_path / "rows.csv")) == ([], {"an empty prompt": 1})


ROW = b'{"prompt": "Why?", "chosen": "a", "rejected": "b"}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b"\xef\xbb\xbf" + ROW),
        ("rows.jsonl", ROW + b"\n\n  \r\n"),
        ("rows.json", b"\xef\xbb\xbf\n[" + ROW + b"]\n"),
        ("rows.json", ROW + b"\n" + ROW.replace(b"W", b"H")),
        ("rows.csv", b'\xef\xbb\xbfprompt,chosen,rejected\r\nWhy?,"a\n\nb",b\r\n\r\n'),
        ("rows.tsv", b"prompt\tchosen\trejected\nWhy?\ta\tb\n\n"),
    ],
)
def test_marks_of_the_byte_order_and_empty_lines_at_the_end_do_no_harm(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert rows_of(Data(str(tmp_path / name), "", ""))[0][0]["prompt"] == "Why?"


def parquet(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


FIRST = "prompt,chosen,rejected\nWhy?,a,b\n"
DEFLATED = gzip.compress(ROW * 50, mtime=0)  # the same in every process that collects the tests


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.txt", b"x", "is of no kind that can be read"),
        ("rows.parquet", b"no parquet", "behind row 0"),
        ("rows.parquet", parquet(pa.table([[1], [2]], names=["a", "a"])), "behind row 0: the column a is there twice"),
        (
            "rows.parquet",
            parquet(pa.table({"day": pa.array([2**31 - 1], pa.date32())})),
            "row 0: column day: .*: correct",
        ),
        (
            "rows.parquet",
            parquet(pa.table({"at": pa.array([0], pa.timestamp("s", "Mars/Base"))})),
            "row 0: column at: ",
        ),
        ("rows.csv", b"", "is empty"),
        ("rows.csv", b"prompt,chosen,rejected\n", "is empty"),
        ("rows.csv", f"{FIRST}How?,a\n".encode(), "behind row 1: 2 fields, but 3 columns"),
        ("rows.csv", f"{FIRST}How?,a,b,c\n".encode(), "behind row 1: 4 fields, but 3 columns"),
        ("rows.csv", b"prompt,prompt\nx,y\n", "the column prompt is there twice"),
        ("rows.csv", FIRST.encode() + b"\xff", "line 3: byte 1 is not UTF-8"),
        ("rows.csv", f'{FIRST}How?,"a,b\n'.encode(), "behind row 1"),
        ("rows.jsonl.gz", b"no gzip", "cannot be unpacked"),
        ("rows.jsonl.gz", DEFLATED[:10] + b"\xff" + DEFLATED[11:], "cannot be unpacked"),
        ("rows.jsonl.gz", DEFLATED[:-9], "cannot be unpacked"),
        ("rows.jsonl.zst", zstd(ROW * 50)[:-9], "cannot be unpacked"),
        ("rows.jsonl", b"", "is empty"),
        ("rows.jsonl", b"\n", "is empty"),
        ("rows.json", b"", "is empty"),
        ("rows.json", b"[]", "is empty"),
        ("rows.json", b"3", "neither a list of objects nor an object per line"),
        ("rows.json", b"[3]", "neither a list of objects nor an object per line"),
        ("rows.json", b"[" + ROW, "behind row 0: not JSON"),
        ("rows.json", b'[{"a": 0, "a": 1}]', "the key a is there twice"),
        ("rows.jsonl", ROW + b'\n{"a": {"b": 0, "b": 1}}\n', "line 2: the key b is there twice: correct the line"),
        ("rows.jsonl", b'{"a": %s}\n' % (b"9" * 5000), "line 1: a number of 5000 digits: correct the line"),
        ("rows.jsonl", b'{"a": %s1%s}' % (b"[" * 100_000, b"]" * 100_000), "line 1: lists in lists"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as refused:
        rows_of(Data(str(tmp_path / name), "", ""))
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.xz", ".csv.bz2", ".tsv.zst", ".parquet"])
def test_a_damaged_file_is_read_or_refused_in_one_sentence(tmp_path, suffix):
    dice = random.Random(0)
    rows = [
        {"prompt": f"{n}?", "chosen": dice.randbytes(9).hex(), "rejected": "x", "score_chosen": 1} for n in range(40)
    ]
    path = tmp_path / f"rows{suffix}"
    data, whole = stored(rows, path), path.read_bytes()
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(bytes(content[: dice.choice([len(content), dice.randrange(len(content))])]))
        try:
            rows_of(data)
        except UserError as refused:
            assert "\n" not in str(refused)


def test_missing_files_and_patterns_that_match_none_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.csv is missing"):
        rows_of(Data(str(tmp_path / "nothing.csv"), "", ""))
    with pytest.raises(UserError, match=r"has no file \*"):
        rows_of(Data(str(tmp_path), "", ""))
    with pytest.raises(UserError, match=r"has no file train\*"):
        rows_of(Data(str(tmp_path), "", "", files={"train": "train*"}))
    with pytest.raises(UserError, match=r"data\.files names files in a folder"):
        rows_of(Data(str(tmp_path / "x.jsonl"), "", "", files={"train": "train*"}))


def test_a_prompt_of_the_test_files_is_not_trained_on(tmp_path):
    for name, prompts in {"train": "abc", "test": "cd"}.items():
        rows = [{"prompt": f"{letter}?", "chosen": "x", "rejected": name} for letter in prompts]
        stored(rows, tmp_path / f"{name}.jsonl")
    rows, dropped = rows_of(Data(str(tmp_path), "", "", files={"train": "train*", "test": "test*"}))
    assert [(row["prompt"], row["split"]) for row in rows if row["split"] == "test"] == [("c?", "test"), ("d?", "test")]
    assert dropped == {"a prompt that is in split test as well": 1}


def test_a_dataset_is_downloaded_at_its_commit_and_appears_whole(tmp_path, monkeypatch):
    asked = {}

    class Hub:
        def dataset_info(self, repository, revision):
            assert (repository, revision) == ("org/set", "v1")
            return type("Info", (), {"sha": "0abc"})()

    def snapshot(repository, repo_type, revision, local_dir, allow_patterns):
        asked.update(repository=repository, repo_type=repo_type, revision=revision, patterns=allow_patterns)
        schemas.full_hh_rlhf(local_dir, 3)

    monkeypatch.setattr(sources, "HfApi", Hub)
    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    folder = tmp_path / "sets" / "one"
    sources.download(Download("org/set", "v1", str(folder)))
    assert (asked["repo_type"], asked["revision"]) == ("dataset", "0abc")
    assert "**.parquet" in asked["patterns"]
    assert json.loads((folder / "origin.json").read_text()) == {"repository": "org/set", "revision": "0abc"}
    assert len(rows_of(Data(str(folder), "", "", files={"train": "**/train*"}))[0]) == 3

    def broken(*_, **__):
        raise LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr(sources, "snapshot_download", broken)
    with pytest.raises(UserError, match=r"org/set at revision v1 could not be downloaded \(no network\)"):
        sources.download(Download("org/set", "v1", str(folder)))
    assert (folder / "origin.json").exists(), "what was there stays"


def test_only_prompts_of_test_are_kept_as_text(published):
    data, prompts = published("full_hh_rlhf"), Prompts()
    for row in rows_of(data)[0]:
        prompts.add(row)
    assert len(prompts.unseen(data)) == 30
