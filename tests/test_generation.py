import dataclasses
import json

import pytest

from pipeline import generation
from pipeline.config import Point
from pipeline.decoder import GuidedDecoder
from pipeline.store import digest

PROMPTS = ["Describe a rainy Monday.", "Why?", "Tell me about tea."]


@pytest.fixture
def sweep(smoke_params):
    points = {"base": Point(), "one": Point({"one": 1.0}), "both": Point({"one": 0.5, "two": 0.5})}
    decoding = dataclasses.replace(smoke_params.decoding, batch_size=2)
    return dataclasses.replace(
        smoke_params, decoding=decoding, sweep=dataclasses.replace(smoke_params.sweep, points=points)
    )


def rows_of(params, tiny, arms, store):
    wanted = [request for _, _, request in generation.point_requests(params, PROMPTS)]
    return generation.generate_stored(wanted, params, arms, tiny, store, "test")


def test_an_interrupted_run_goes_on_and_equals_an_uninterrupted_one(sweep, tiny, arms, tmp_path, monkeypatch):
    whole = rows_of(sweep, tiny, arms, tmp_path / "whole.jsonl")
    generate, batches = GuidedDecoder.generate, []

    def dying(self, requests):
        batches.append(len(requests))
        for count, found in enumerate(generate(self, requests)):
            if len(batches) == 3 and count == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(GuidedDecoder, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")
    with (tmp_path / "store.jsonl").open("a") as stream:
        stream.write('{"digest": "torn')
    counted = []

    def counting(self, requests):
        counted.extend(requests)
        return generate(self, requests)

    monkeypatch.setattr(GuidedDecoder, "generate", counting)
    assert rows_of(sweep, tiny, arms, tmp_path / "store.jsonl") == whole
    assert len(counted) == len(whole) - batches[0] - batches[1]


def test_finished_rows_load_no_model(sweep, tiny, arms, tmp_path, monkeypatch):
    whole = rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")
    monkeypatch.setattr(generation, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert rows_of(sweep, tiny, arms, tmp_path / "store.jsonl") == whole


def test_a_new_point_costs_only_itself_and_names_do_not_matter(sweep, tiny, arms, tmp_path, capsys):
    rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")
    renamed = {f"again_{name}": point for name, point in sweep.sweep.points.items()}
    more = renamed | {"two": Point({"one": 0.0, "two": 1.0})}
    wider = dataclasses.replace(sweep, sweep=dataclasses.replace(sweep.sweep, points=more))
    rows_of(wider, tiny, arms, tmp_path / "store.jsonl")
    assert f"{len(PROMPTS) * 3} of {len(PROMPTS) * 4} rows" in capsys.readouterr().out


def test_a_row_depends_on_the_adapter_that_guides_it_and_on_no_other(sweep, tiny, arms, tmp_path, capsys):
    rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")
    rows_of(sweep, tiny, arms | {"two": arms["one"]}, tmp_path / "store.jsonl")
    assert f"{len(PROMPTS) * 2} of {len(PROMPTS) * 3} rows" in capsys.readouterr().out


def test_rows_carry_what_an_evaluation_needs(sweep, tiny, arms, tmp_path):
    row = rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")[1]
    assert set(row) >= {
        "prompt",
        "response",
        "prompt_tokens",
        "n_tokens",
        "finish",
        "logp",
        "logp_base",
        "kl",
        "stream",
    }
    assert json.loads(json.dumps(row)) == row
    assert row["kl"] >= 0


def test_the_stream_is_of_seed_prompt_and_point():
    keys = [
        generation.stream_key(0, "a", {}, 1.0, 0), generation.stream_key(1, "a", {}, 1.0, 0),
        generation.stream_key(0, "b", {}, 1.0, 0), generation.stream_key(0, "a", {"x": 1.0}, 1.0, 0),
        generation.stream_key(0, "a", {}, 0.5, 0), generation.stream_key(0, "a", {}, 1.0, 1),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert generation.stream_key(0, "a", {"x": 0.0}, 1.0, 0) == keys[0] != digest("a")
