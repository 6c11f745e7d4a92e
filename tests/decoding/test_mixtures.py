"""Adapters of one mixture: whatever runs them, a row is read by one lane, the adapter that PEFT would merge them to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.config.errors import UserError
from pipeline.config.points import BASE, REFERENCE
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.logits_processor import GuidanceLogitsProcessor
from pipeline.generation.methods.soups import merge
from pipeline.models.loading import load_model
from pipeline.models.mixtures import HEADER, lanes_of_weights, mixed_lane, shares_of
from pipeline.models.prompting import Prompter
from tests.decoding.test_cross_tokenizer import foreign_model, sentencepiece
from tests.decoding.test_logits_processor import inputs
from tests.reference import CPU, PROMPTS, run

SHARES = {"one": 0.25, "two": 0.75}


@pytest.fixture(scope="module")
def folders(arms, tmp_path_factory):
    """Two adapters of one mixture, one by itself, and what the two are together at `SHARES`."""
    home = tmp_path_factory.mktemp("mixture")
    for name in SHARES:
        (home / name).mkdir()
        for file in arms[name].iterdir():
            (home / name / file.name).write_bytes(file.read_bytes())
        tensors = load_file(arms[name] / "adapter_model.safetensors")
        save_file(tensors, home / name / "adapter_model.safetensors", metadata={"format": "pt", HEADER: "m"})
    merge({arms[name]: share for name, share in SHARES.items()}, home / "merged", products=True)
    return {name: home / name for name in SHARES} | {"three": arms["three"], "merged": home / "merged"}


def on_the_base(tiny, prompter, folders, static=False):
    backbone = Backbone(load_model(tiny, torch.float32, CPU), prompter, folders)
    backbone.static = static
    return GuidedDecoder(backbone, batch_size=8)


def in_fixed_shapes(tiny, prompter, folders):
    return on_the_base(tiny, prompter, folders, static=True)


def beside_another_base(tiny, prompter, folders):
    torch.manual_seed(1)
    strong = load_model(tiny, torch.float32, CPU)
    for weight in strong.parameters():
        weight.data += 0.1 * weight.std() * torch.randn_like(weight)
    small = Backbone(load_model(tiny, torch.float32, CPU), prompter, folders, name=REFERENCE)
    return GuidedDecoder(Backbone(strong, prompter), small, batch_size=8, num_speculative_tokens=2)


def across_tokenizers(tiny, prompter, folders):
    tokenizer = sentencepiece()
    small = Backbone(load_model(tiny, torch.float32, CPU), prompter, folders, name=REFERENCE)
    base = Backbone(foreign_model(len(tokenizer)), Prompter(tokenizer, None))
    return GuidedDecoder(base, small, batch_size=8)


@pytest.mark.parametrize("load", [on_the_base, in_fixed_shapes, beside_another_base, across_tokenizers])
@pytest.mark.filterwarnings("ignore:.*another tokenizer")
def test_a_row_of_a_mixture_is_that_of_the_merged_adapter(tiny, prompter, folders, load):
    points = [
        ({name: 0.8 * share for name, share in SHARES.items()}, {"merged": 0.8}),
        ({"one": 0.6}, {"one": 0.6}),  # between them rows that other lanes read
        ({}, {}),
        ({name: 0.4 * share for name, share in SHARES.items()} | {"three": 0.5}, {"merged": 0.4, "three": 0.5}),
        ({"one": 0.3, "two": 0.1}, None),
    ]
    how = {"max_new_tokens": 6, "temperature": 0.0}
    mixed = [Request(prompt, weights, **how) for prompt in PROMPTS[:2] for weights, _ in points]
    found = run(load(tiny, prompter, {name: folders[name] for name in ("one", "two", "three")}), mixed)
    alone = {name: folders[name] for name in ("one", "three", "merged")}
    told = [(place, points[place % len(points)][1]) for place in range(len(mixed))]
    asked = {place: Request(mixed[place].prompt, weights, **how) for place, weights in told if weights is not None}
    wanted = dict(zip(asked, run(load(tiny, prompter, alone), list(asked.values())), strict=True))
    for place, row in wanted.items():
        assert found[place].tokens == row.tokens
        assert [found[place].logp, found[place].kl] == pytest.approx([row.logp, row.kl], abs=1e-3)
    if load in (on_the_base, in_fixed_shapes):
        lanes = [2, None, None, 3, 2]
        assert [row.forwards for row in found] == [
            count and count * len(row.tokens) for count, row in zip(2 * lanes, found, strict=True)
        ]


def test_each_arm_of_a_mixture_still_tells_its_own_rewards(tiny, prompter, folders):
    both = on_the_base(tiny, prompter, {name: folders[name] for name in SHARES})
    request = Request(PROMPTS[0], SHARES, temperature=0.0, max_new_tokens=5)
    *_, [last] = both.stream([request])
    alone = on_the_base(tiny, prompter, {name: folders[name] for name in ("three", "merged")} | {"one": folders["one"]})
    weights = {"merged": 1.0, "one": 0.0}
    *_, [wanted] = alone.stream([Request(PROMPTS[0], weights, temperature=0.0, max_new_tokens=5)])
    assert last.tokens == wanted.tokens
    assert sorted(last.rewards) == ["one", "two"]
    assert last.rewards["one"] == pytest.approx(wanted.rewards["one"], abs=1e-4)
    trace = both.trace(request, list(last.tokens))
    assert trace.arms == ["one", "two"]
    assert sum(trace.rewards("one")) == pytest.approx(sum(wanted.rewards["one"]), abs=1e-3)
    assert sum(trace.token_logps("guided")) == pytest.approx(last.generation.logp if last.generation else 0, abs=1e-3)


def test_generate_of_transformers_reads_a_mixture_as_one(base, prompter, folders):
    def generated(weights, names):
        adapted = Backbone(base, prompter, {name: folders[name] for name in names}, name=None)
        guidance = GuidanceLogitsProcessor(prompter, weights, adapted)
        given = inputs(prompter)
        tokens = base.generate(**given, do_sample=False, max_new_tokens=6, logits_processor=[guidance])
        ids = given["input_ids"]
        return tokens, guidance.sequence_logits(ids, base(ids).logits)

    mixed, merged = generated(SHARES, SHARES), generated({"merged": 1.0}, ["merged"])
    assert mixed[0].equal(merged[0])
    torch.testing.assert_close(mixed[1], merged[1], atol=1e-4, rtol=1e-4)


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(1e-3, 10), min_size=1))
@settings(deadline=None)
def test_lanes_keep_the_sum_of_the_weights_and_their_shares(weights):
    mixtures = {"a": "x", "b": "x", "c": "y"}
    lanes = lanes_of_weights(weights, mixtures)
    assert sum(lanes.values()) == pytest.approx(sum(weights.values()))
    for lane, strength in lanes.items():
        for name, share in shares_of(lane, weights).items():
            assert share * strength == pytest.approx(weights[name], rel=1e-4, abs=1e-4)
    assert len(lanes) == len({mixtures.get(name, name) for name in weights})
    assert lanes_of_weights({name: 2 * alpha for name, alpha in weights.items()}, mixtures).keys() == lanes.keys()


def test_what_is_no_mixture_is_left_as_it_is():
    assert lanes_of_weights({"a": -1.0, REFERENCE: 1.0}, {"a": "x"}) == {"a": -1.0, REFERENCE: 1.0}
    assert shares_of(BASE, ["a"]) == {}
    assert shares_of("0.5 a + 0.5 b", ["a"]) == {}
    assert shares_of(mixed_lane({"a": 0.5, "b c": 0.5}), ["a", "b c"]) == {"a": 0.5, "b c": 0.5}
    with pytest.raises(UserError, match="a, b are one ARM for all mixes, which knows no negative weight"):
        lanes_of_weights({"a": -1.0, "b": 2.0}, {"a": "x", "b": "x"})
