import json
import lzma

import pandas as pd
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.config import UserError
from pipeline.params import Data, Download, Objective
from pipeline.preferences import sources
from pipeline.preferences.card import DataCard
from pipeline.preferences.reading import Prompts, read_rows
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
        return compose_params(f"data={name}", "data.download=[]", f"data.path={tmp_path / name}").data

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


def stored(rows, path):
    match "".join(path.suffixes):
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".jsonl.xz":
            path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            pd.DataFrame(rows).to_parquet(path)
        case ".csv":
            pd.DataFrame(rows).to_csv(path, index=False)
    return Data(path=str(path), sampler="", prompts=str(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".json", ".parquet"])
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


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.txt", b"x", "is of no kind that can be read"),
        ("rows.parquet", b"no parquet", "behind row 0"),
        ("rows.csv", b"", "behind row 0"),
        ("rows.jsonl.gz", b"no gzip", "cannot be unpacked"),
        ("rows.jsonl", b"", "is empty"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as refused:
        rows_of(Data(str(tmp_path / name), "", ""))
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


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
