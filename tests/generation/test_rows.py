import dataclasses
import json
import sys

import pytest

from pipeline.config.errors import UserError
from pipeline.config.schema import Objective, Point, Sampling
from pipeline.config.workspace import Workspace
from pipeline.data.card import DataCard
from pipeline.data.files import read_jsonl, write_jsonl
from pipeline.data.responses import GeneratedRow
from pipeline.decoding import decoder
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.generation import explain
from pipeline.generation.model_set import ModelSet
from pipeline.generation.rows import (
    Shard,
    generate_shard,
    generate_stored,
    generate_sweep,
    point_requests,
    prompts_with_room,
)
from pipeline.generation.samples import sample_responses
from pipeline.models.loading import Source
from pipeline.models.prompting import Prompter
from pipeline.stages import generate as stage
from tests.tiny import write_tiny

PROMPTS = ["Describe a rainy Monday.", "Why?", "Tell me about tea."]


@pytest.fixture
def sweep(smoke_params):
    points = {"base": Point(), "one": Point({"one": 1.0}), "both": Point({"one": 0.5, "two": 0.5})}
    decoding = dataclasses.replace(smoke_params.decoding, batch_size=2)
    objectives = {name: Objective(label=name) for name in ("one", "two")}
    return dataclasses.replace(
        smoke_params,
        objectives=objectives,
        decoding=decoding,
        sweep=dataclasses.replace(smoke_params.sweep, points=points),
    )


def furnished(folder, tiny, arms):
    """A workspace with the tiny base and the ARMs in it."""
    workspace = Workspace(folder / "models", folder / "results", folder / "scratch")
    places = {workspace.model("tiny"): tiny, **{workspace.arm(name): folder for name, folder in arms.items()}}
    for place, folder in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(folder)
    return workspace


def rows_of(params, tiny, arms, store):
    """Rows of the tiny base in a workspace of their own around the store's file."""
    workspace = furnished(store.parent, tiny, arms)
    wanted = [request for _, request in point_requests(params, "tiny", PROMPTS)]
    return generate_stored(wanted, params, workspace, "tiny", store.stem)


def store_of(folder):
    return folder / "scratch" / "store" / "store.jsonl"


def test_an_interrupted_run_goes_on_and_equals_an_uninterrupted_one(sweep, tiny, arms, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "_ROUNDS", 1)  # chunks of two rows
    whole = rows_of(sweep, tiny, arms, tmp_path / "whole.jsonl")
    generate, asked = GuidedDecoder.generate, []

    def dying(self, requests, progress=None):
        for count, found in enumerate(generate(self, requests, progress)):
            if count == 5:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(GuidedDecoder, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")
    readable = [GeneratedRow.from_json(json.loads(line)["row"]) for line in store_of(tmp_path).read_text().splitlines()]
    assert len(readable) == 4 and all(row in whole for row in readable)
    with store_of(tmp_path).open("a") as stream:
        stream.write('{"digest": "torn')

    def counting(self, requests, progress=None):
        asked.extend(requests)
        return generate(self, requests, progress)

    monkeypatch.setattr(GuidedDecoder, "generate", counting)
    assert rows_of(sweep, tiny, arms, tmp_path / "store.jsonl") == whole
    assert len(asked) == len(whole) - 4


def test_finished_rows_load_no_model(sweep, tiny, arms, tmp_path, monkeypatch):
    whole = rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")
    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("the model was loaded"))
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
    assert set(row.to_json()) >= {
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
    assert GeneratedRow.from_json(json.loads(json.dumps(row.to_json()))) == row
    assert row.kl >= 0


def test_token_rewards_are_of_the_tokens_that_were_drawn(sweep, tiny, arms, tmp_path):
    workspace = furnished(tmp_path, tiny, arms)
    rows = generate_sweep(sweep, workspace, "tiny", PROMPTS[:1])
    traces = explain.rows_explained(sweep, workspace, rows)
    assert [len(row.tokens) for row in rows] == [row.n_tokens for row in rows]
    spell = Prompter.load(tiny, None).pieces
    assert [trace["tokens"] for trace in traces] == [spell(row.tokens[: sweep.explain.tokens]) for row in rows]


def test_the_stream_is_of_seed_prompt_and_point():
    plain = Request("a")
    others = [
        Request("a", seed=1), Request("b"), Request("a", {"x": 1.0}), Request("a", temperature=0.5),
        Request("a", sample=1),
    ]  # fmt: skip
    assert len({request.stream for request in (plain, *others)}) == 6
    assert Request("a", {"x": 0.0}, max_new_tokens=7, top_k=3).stream == plain.stream


@pytest.mark.parametrize(
    "change", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"stop": ("e",)}, {"temperature": 0.0}]
)
def test_rows_sampled_otherwise_are_other_rows(sweep, tiny, arms, tmp_path, capsys, change):
    before = rows_of(sweep, tiny, arms, tmp_path / "store.jsonl")
    changed = dataclasses.replace(sweep, decoding=dataclasses.replace(sweep.decoding, **change))
    assert rows_of(changed, tiny, arms, tmp_path / "store.jsonl") != before
    assert capsys.readouterr().out.count(": 0 of 9 rows") == 2


def test_shards_in_any_order_are_merged_into_what_one_process_writes(sweep, tiny, arms, tmp_path, monkeypatch, capsys):
    exact = dataclasses.replace(sweep.models["tiny"], dtype="float64")  # where neighbours round nothing
    sweep = dataclasses.replace(sweep, models={**sweep.models, "tiny": exact})
    alone, parted = (furnished(tmp_path / name, tiny, arms) for name in ("alone", "parted"))
    whole = generate_sweep(sweep, alone, "tiny", PROMPTS)
    for part in (1, 0):
        count, file = generate_shard(sweep, parted, "tiny", PROMPTS, Shard(part, 2))
        assert (count, len(file.read_text().splitlines())) == ([6, 3][part], [6, 3][part])
    monkeypatch.setattr(GuidedDecoder, "load", None)  # nothing is left to decode
    assert generate_sweep(sweep, parted, "tiny", PROMPTS) == whole
    assert "generate: 9 of 9 rows are in the store already" in capsys.readouterr().out


def test_a_prompt_longer_than_a_context_is_left_out_and_counted(sweep, tiny, arms, tmp_path, capsys):
    workspace, long = furnished(tmp_path, tiny, arms), "rain " * 300
    file = workspace.results / "prepare" / "prompts.jsonl"
    write_jsonl(file, [{"prompt": prompt} for prompt in (PROMPTS[0], long, PROMPTS[1])])
    params = dataclasses.replace(sweep, base="tiny")
    stage.run(params, workspace)
    rows = [row for _, row in read_jsonl(workspace.results / "generate" / "rows.jsonl")]
    assert {row["prompt"] for row in rows} == set(PROMPTS[:2]) and len(rows) == 6
    assert "generate: 1 of 3 prompts left out: with 8 new tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="no prompt leaves room for 8 tokens"):
        prompts_with_room(params, workspace, ["tiny"], [long])


def test_a_prompt_is_left_out_by_the_shortest_context_of_all_models(sweep, tiny, arms, tmp_path):
    workspace = furnished(tmp_path, tiny, arms)
    workspace.arm("one").unlink()
    write_tiny(workspace.arm("one"), context=48)  # an ARM that is a model of its own
    prompts = ["Why?", "rain " * 30]
    assert prompts_with_room(sweep, workspace, ["tiny"], prompts) == prompts[:1]
    unguided = dataclasses.replace(sweep, sweep=dataclasses.replace(sweep.sweep, points={"base": Point()}))
    assert prompts_with_room(unguided, workspace, ["tiny"], prompts) == prompts


def test_prompts_too_long_to_sample_from_are_on_the_data_card(sweep, tiny, arms, tmp_path):
    workspace, card = furnished(tmp_path, tiny, arms), DataCard(sweep.objectives)
    prompts = [{"id": "a", "prompt": "Why?", "split": "train"}, {"id": "b", "prompt": "rain " * 300, "split": "test"}]
    params = dataclasses.replace(sweep, data=dataclasses.replace(sweep.data, sampler="tiny"))
    samples = sample_responses(prompts, [None], params, Sampling(2, 1.0, 4), workspace, card)[None]
    assert (len(samples["a"]), samples["b"]) == (2, [])
    [(reason, told)] = card.summary()["dropped"].items()
    assert "no room for a response" in reason and told == {"rows": 1, "such as": ["prompt b"]}


@pytest.mark.parametrize("text", ["3/8", "shard=8/8", "shard=-1/8", "shard=a/b", "shard=0/0"])
def test_a_shard_that_is_none_is_refused(text):
    assert Shard.parse("shard=7/8") == Shard(7, 8)
    with pytest.raises(UserError, match="is no part of the prompts: write shard=0/4"):
        Shard.parse(text)


def test_vllm_where_it_is_not_installed_is_one_sentence(smoke_params, workspace, monkeypatch):
    monkeypatch.setitem(sys.modules, "pipeline.decoding.vllm.decoder", None)
    with pytest.raises(UserError, match="make vllm"):
        ModelSet(smoke_params, workspace, "tiny", ()).vllm_decoder(4)
