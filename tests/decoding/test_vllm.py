"""Runs in the environment of `make vllm`, once for each of vLLM's model runners; everywhere else it is skipped."""

import json
import math
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if SLOW := os.environ.get("TRITON_INTERPRET") == "1":
    import tests.decoding.triton_on_cpu  # noqa: F401  before vLLM
pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from pipeline.config.errors import UserError
from pipeline.decoding.decoder import GuidedDecoder
from pipeline.decoding.request import Request
from pipeline.decoding.vllm.adapters import Adapters
from pipeline.decoding.vllm.decoder import VllmDecoder, _common
from pipeline.decoding.vllm.lanes import Shaping, lane_params
from pipeline.decoding.vllm.scheduler import GroupScheduler
from pipeline.decoding.vllm.settings import EXTRA, settings
from pipeline.generation.rows import generate_sweep
from pipeline.models.fetch import fetch
from pipeline.models.loading import Source
from pipeline.models.mixtures import HEADER, merge
from tests.tiny import tiny_model, tiny_tokenizer, write_adapter

PROMPTS = ["Why?", "Describe a rainy Monday.", "Name something good, and then a second thing that is not.", "Hello"]
POINTS = [{}, {"one": 1.0}, {"two": 0.7}, {"one": 1.0, "two": 0.5}, {"one": 1.5, "base": -0.5}]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model with heads as wide as vLLM's attention wants them, in float32."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), width=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Source(folder, dtype="float32")


@pytest.fixture(scope="module")
def adapters(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: adapted(source, folder / name, seed) for seed, name in enumerate(("one", "two"))}


def adapted(source, folder, seed):
    """A random adapter of some of a model's layers."""
    return write_adapter(source.folder, folder, seed + 1, ["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def small(source, tmp_path_factory):
    """Another model of the vocabulary, asked in another way."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), width=48, seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Source(folder, dtype="float32", template="Question: {prompt}\nAnswer:")


@pytest.fixture(scope="module")
def served(source, adapters):
    """With the stock scheduler, which lets lanes in one by one: what ours prevents, the processor has to notice."""
    room = {"max_model_len": 256, "max_num_batched_tokens": 1024, "enable_chunked_prefill": False}
    return VllmDecoder(source, adapters, batch_size=4, scheduler_cls=None, **room)


@pytest.fixture(scope="module")
def reference(source, adapters):
    return GuidedDecoder.load(source, adapters, device="cpu")


def some(requests, every):
    """All requests, or every so many of them where a step takes half a second."""
    return requests[:: every if SLOW else 1]


def same(found, expected):
    assert sorted(found) == sorted(expected)
    for index, wanted in expected.items():
        assert found[index].tokens == wanted.tokens, index
        assert found[index].finish == wanted.finish
        assert found[index].logp == pytest.approx(wanted.logp, abs=1e-2)
        assert found[index].logp_base == pytest.approx(wanted.logp_base, abs=1e-2)
        assert found[index].kl == pytest.approx(wanted.kl, abs=1e-2)


def test_texts_and_sums_are_those_of_the_decoder_greedy_and_sampled(served, reference):
    """In float32 both draw from the same law by the same random stream: the same tokens."""
    how = [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8}, {"min_p": 0.02, "seed": 7}]
    requests = [
        Request(prompt, weights, **one, max_new_tokens=24 - 3 * place)
        for place, prompt in enumerate(PROMPTS)
        for weights in POINTS
        for one in how
    ]
    requests = some(requests, 7)
    same(dict(served.generate(requests)), dict(reference.generate(requests)))


@pytest.mark.skipif(SLOW, reason="thousands of steps")
@pytest.mark.parametrize("weights", [{}, {"one": 1.0, "two": 0.5}])
def test_first_tokens_are_drawn_from_the_guided_law(served, reference, weights):
    """Chi-square over 3000 draws at temperature 0.7: p is uniform where the law is right."""
    requests = [Request("Why?", weights, temperature=0.7, max_new_tokens=1, seed=seed) for seed in range(3000)]
    drawn = Counter(generation.tokens[0] for _, generation in served.generate(requests))
    law = reference.trace(requests[0], [0]).logps["guided"][0].exp()
    kept = [token for token in range(len(law)) if law[token] * 3000 >= 5]
    expected = [float(law[token]) * 3000 for token in kept]
    observed = [drawn[token] for token in kept]
    rest = 3000 - sum(expected)
    if rest > 5:
        expected, observed = [*expected, rest], [*observed, 3000 - sum(observed)]
    scale = sum(observed) / sum(expected)
    assert chisquare(observed, [value * scale for value in expected]).pvalue > 1e-3


def test_stop_texts_end_a_response_as_in_the_decoder(served, reference):
    [(_, whole)] = reference.generate([Request("Why?", {"one": 1.0}, temperature=0.0, max_new_tokens=24)])
    stop = whole.text[6:9]
    request = Request("Why?", {"one": 1.0}, temperature=0.0, max_new_tokens=24, stop=(stop,))
    [(_, wanted)], [(_, found)] = reference.generate([request]), served.generate([request])
    assert found.text == wanted.text and found.finish == wanted.finish == "stop"
    assert found.tokens == wanted.tokens and found.kl == pytest.approx(wanted.kl, abs=1e-2)


def params_of(group, alphas, mark, shaping=None, **how):
    """Sampling parameters of a group's lanes, by model."""
    request = Request("Why?", **{"temperature": 0.0, **how})
    params = lane_params(
        group, request, alphas, shaping or Shaping(), mark=mark, first=0, guides={}, prompts=[],
        output=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    return dict(zip(alphas, params, strict=True))


def lanes_of(served, group, names, size=8, alpha=1.0):
    """Hand single lanes to the engine behind the frontend's back."""
    ids = served._prompter.prompt_ids("Why?")
    lanes = params_of(group, {"base": 1.0, "one": alpha}, served._mark, max_new_tokens=size)
    for name in names:
        served._engine.add_request(
            f"{group}/{name}", {"prompt_token_ids": ids}, lanes[name], lora_request=served._adapters.adapters.get(name)
        )


def drained(served, abort_after=None):
    """Step until nothing is left; abort a lane after its first step."""
    found = {}
    for step in range(200):
        if not served._engine.has_unfinished_requests():
            break
        for output in served._engine.step():
            if output.finished:
                found[output.request_id] = output.outputs[0]
        if abort_after and step == abort_after[0]:
            served._engine.abort_request([abort_after[1]])
    return found


def test_a_lane_alone_is_marked_at_its_first_step(served):
    lanes_of(served, "alone", ["base"])
    [output] = drained(served).values()
    assert list(output.token_ids) == [served._mark] and output.stop_reason == served._mark


def test_a_lane_that_comes_a_step_later_finds_no_one(served):
    lanes_of(served, "late", ["base"])
    served._engine.step()
    lanes_of(served, "late", ["one"])
    for output in drained(served).values():
        assert list(output.token_ids) == [served._mark]


def test_penalties_and_the_shortest_length_shape_the_sum_before_the_temperature(served, reference):
    """Against the law written down: the reference's greedy path, with OpenAI's penalties taken off its logits."""
    ids, ends = served._prompter.prompt_ids("Why?"), served._ends
    weights = {"one": 1.0}
    how = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "min_tokens": 12, "stop_token_ids": tuple(ends)}
    lanes = params_of("shaped", {"base": 1.0, "one": 1.0}, served._mark, Shaping(**how), max_new_tokens=16)
    for name, params in lanes.items():
        prompt = {"prompt_token_ids": ids}
        served._engine.add_request(f"shaped/{name}", prompt, params, lora_request=served._adapters.adapters.get(name))
    found = list(drained(served)["shaped/base"].token_ids)
    expected = []
    while len(expected) < len(found):
        law_V = reference.trace(Request("Why?", weights), [*expected, 0]).logps["guided"][len(expected)].clone()
        for token, count in Counter(expected).items():
            law_V[token] -= 1.5 + 0.5 * count
        if len(expected) < 12:
            law_V[ends] = -torch.inf
        expected.append(int(law_V.argmax()))
    assert found == expected and len(found) >= 12


def test_when_a_lane_is_aborted_the_other_stops_at_that_step(served, reference):
    lanes_of(served, "gone", ["base", "one"], size=20)
    found = drained(served, abort_after=(4, "gone/one"))
    tokens = list(found["gone/base"].token_ids)
    assert tokens[-1] == served._mark and 4 <= len(tokens) < 20
    request = Request("Why?", {"one": 1.0}, temperature=0.0, max_new_tokens=20)
    [(_, whole)] = reference.generate([request])
    assert tokens[:-1] == whole.tokens[: len(tokens) - 1]


def test_unguided_requests_beside_guided_ones_are_untouched(served, reference):
    params = SamplingParams(temperature=0.0, max_tokens=12, detokenize=False, ignore_eos=True)
    ids = served._prompter.prompt_ids("Hello")
    served._engine.add_request("plain", {"prompt_token_ids": ids}, params)
    lanes_of(served, "beside", ["base", "one"], size=12)
    few = SamplingParams(temperature=0.0, max_tokens=12, detokenize=False, ignore_eos=True, allowed_token_ids=[5, 6])
    served._engine.add_request("few", {"prompt_token_ids": ids}, few)  # −inf everywhere else, before we see it
    found = drained(served)
    [(_, alone)] = reference.generate([Request("Hello", temperature=0.0, max_new_tokens=12)])
    size = len(alone.tokens)
    assert list(found["plain"].token_ids)[:size] == alone.tokens
    assert set(found["few"].token_ids) <= {5, 6}
    assert list(found["beside/base"].token_ids) == list(found["beside/one"].token_ids)
    [(_, whole)] = reference.generate([Request("Why?", {"one": 1.0}, temperature=0.0, max_new_tokens=12)])
    assert list(found["beside/base"].token_ids)[: len(whole.tokens)] == whole.tokens


def test_a_generation_left_halfway_leaves_no_sums_to_the_next(served, reference):
    requests = [Request("Why?", {"one": 1.0}, temperature=0.0, max_new_tokens=size) for size in (2, 20)]
    begun = served.generate(requests)
    assert next(begun)[0] == 0
    begun.close()
    same(dict(served.generate(requests)), dict(reference.generate(requests)))


def test_a_law_that_is_no_number_is_an_error_and_spoils_no_other(served, reference):
    requests = [Request("Hello", {"one": 1.0}, temperature=0.0, max_new_tokens=20), Request("Why?", {"one": 1e38})]
    with pytest.raises(UserError, match="logits are not finite in the response to 'Why\\?'"):
        list(served.generate(requests))
    assert not served._engine.has_unfinished_requests()
    lanes_of(served, "finite", ["base", "one"], size=8)
    lanes_of(served, "none", ["base", "one"], size=8, alpha=1e38)
    found = drained(served)
    [(_, whole)] = reference.generate([Request("Why?", {"one": 1.0}, temperature=0.0, max_new_tokens=8)])
    assert list(found["finite/base"].token_ids)[: len(whole.tokens)] == whole.tokens
    assert list(found["none/base"].token_ids) == list(found["none/one"].token_ids) == [served._mark]


def test_a_drawn_mark_is_a_token_like_any_other(served, reference):
    """Where the law itself draws the mark, the group goes on behind it."""
    [(_, whole)] = reference.generate([Request("Why?", {"one": 1.0}, temperature=0.0, max_new_tokens=12)])
    served._mark, before = whole.tokens[3], served._mark
    try:
        [(_, found)] = served.generate([Request("Why?", {"one": 1.0}, temperature=0.0, max_new_tokens=12)])
    finally:
        served._mark = before
    assert found.tokens == whole.tokens and found.kl == pytest.approx(whole.kl, abs=1e-2)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request("Why?", {"three": 1.0}), "weights name three, but the ARMs are one, two"),
        (Request("Why?", {"one": 1.0}, max_new_tokens=300), "exceeds the context of 256"),
    ],
)
def test_what_it_cannot_do_is_refused(served, request_, said):
    with pytest.raises(UserError, match=said):
        list(served.generate([request_]))


def test_only_our_own_code_may_write_what_a_lane_tells(served):
    """Whatever route a request comes by: a number out of its range would end the engine for everybody."""
    facts = params_of("x", {"base": 1.0}, 9, max_new_tokens=2)["base"].extra_args[EXTRA]
    for forged in ({**facts, "top_k": 2**63, "seal": "0"}, {"group": {}}, json.dumps(facts), [1], 5, ""):
        params = SamplingParams(temperature=0.0, max_tokens=2, extra_args={EXTRA: forged})
        with pytest.raises(Exception, match="vllm_xargs is internal"):
            served._engine.add_request("forged", {"prompt_token_ids": [5, 6]}, params)
    assert not served._engine.has_unfinished_requests()


@pytest.mark.skipif(SLOW, reason="hundreds of steps")
def test_many_requests_one_after_the_other_leave_nothing_behind(served):
    requests = [Request("Why?", {"one": 1.0}, max_new_tokens=2, seed=seed) for seed in range(200)]
    assert len(list(served.generate(requests))) == 200
    [processor] = served._llm.collective_rpc(_processors)[0]
    assert not processor.sums and not served._engine.has_unfinished_requests()
    assert math.isfinite(sum(len(lane.output) for lane in processor._rows.values()))


def _processors(worker):
    return list(worker._lane_processors())


def test_parts_agree_up_to_their_first_difference():
    assert _common([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert _common([[1, 2], [2]]) == []


# Engines of their own: one process holds one engine after the other, so `served` is of no use behind this line.


def test_a_cache_too_small_for_all_preempts_and_every_text_is_right_all_the_same(source, adapters, reference):
    """64 blocks hold fewer long groups than there are slots: lanes are preempted, marked, and go on."""
    small = VllmDecoder(
        source, adapters, batch_size=6, max_model_len=256, max_num_batched_tokens=2048, num_gpu_blocks_override=10,
        block_size=32, enable_prefix_caching=False,
    )  # fmt: skip
    begun = []
    begin = small._begin
    small._begin = lambda group: begun.append(group.part) or begin(group)
    requests = [
        Request(prompt, weights, temperature=0.0, max_new_tokens=60) for prompt in PROMPTS for weights in POINTS
    ]
    requests = some(requests, 3)
    same(dict(small.generate(requests)), dict(reference.generate(requests)))
    assert max(begun) > 0 and len(begun) > len(requests), "nothing was preempted: the test shows nothing"


def test_arms_of_another_model_and_adapters_of_the_base_guide_together(source, adapters, small, tmp_path):
    """An adapter of a smaller model, a whole model, their reference, and a lane; the cache too small for all."""
    arms = {"weak": adapted(small, tmp_path / "weak", 9), "whole": small.folder}
    how = {"arm_base": small, "policies": {"one": adapters["one"]}, "reference": True}
    points = [{"weak": 1.0, "reference": -0.5}, {"whole": 0.6, "one": 1.0}, {"one": 0.7}, {"weak": 1.0, "base": 0.5}]
    requests = [
        Request(prompt, weights, temperature=temperature, max_new_tokens=60)
        for prompt in PROMPTS for weights in points for temperature in (0.0, 0.8)
    ]  # fmt: skip
    requests = some(requests, 5)
    mixed = VllmDecoder(
        source, arms, **how, batch_size=6, max_model_len=160, max_num_batched_tokens=2048, num_gpu_blocks_override=8,
        block_size=32, enable_prefix_caching=False,
    )  # fmt: skip
    begun = []
    begin = mixed._begin
    mixed._begin = lambda group: begun.append(group.part) or begin(group)
    found = dict(mixed.generate(requests))
    same(found, dict(GuidedDecoder.load(source, arms, device="cpu", **how).generate(requests)))
    assert len(begun) > len(requests), "nothing was preempted: the test shows nothing"


def test_a_guide_of_another_vocabulary_is_refused(source, small, tmp_path):
    shutil.copytree(small.folder, tmp_path / "arm")
    told = json.loads((tmp_path / "arm/tokenizer.json").read_text())
    first, second = list(told["model"]["vocab"])[40:42]
    vocabulary = told["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "arm/tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="use an ARM with the base's tokenizer"):
        VllmDecoder(source, {"arm": tmp_path / "arm"}, batch_size=2)


def test_a_cache_that_does_not_hold_one_request_is_one_sentence(source, adapters):
    tiny = VllmDecoder(
        source, adapters, batch_size=2, max_model_len=96, max_num_batched_tokens=512, num_gpu_blocks_override=5,
        block_size=32, enable_prefix_caching=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="KV cache does not hold one guided request"):
        list(tiny.generate([Request("Why?", {"one": 1.0, "two": 1.0}, temperature=0.0, max_new_tokens=80)]))


def test_prompts_that_no_step_takes_together_are_cached_one_after_the_other(source, adapters, tmp_path):
    arms = {**adapters, "three": adapted(source, tmp_path / "three", 3)}
    narrow = VllmDecoder(source, arms, batch_size=1, max_model_len=256, max_num_batched_tokens=256, block_size=32)
    request = Request("Why? " * 60, dict.fromkeys(arms, 0.5), temperature=0.0, max_new_tokens=20)
    assert len(narrow._prompter.prompt_ids(request.prompt)) > 256 / 2
    expected = GuidedDecoder.load(source, arms, device="cpu").generate([request])
    same(dict(narrow.generate([request])), dict(expected))


def test_a_lane_waits_for_the_others(source, adapters):
    waiting = VllmDecoder(source, adapters, batch_size=2, max_model_len=128)
    lanes_of(waiting, "late", ["base"])
    assert not waiting._engine.step()
    lanes_of(waiting, "late", ["one"])
    first, second = drained(waiting).values()
    assert list(first.token_ids) == list(second.token_ids) and waiting._mark not in first.token_ids
    lanes_of(waiting, "gone", ["base"])
    waiting._engine.abort_request(["gone/base"])
    lanes_of(waiting, "gone", ["one"])
    assert not waiting._engine.step(), "the lane that was taken back is not counted"
    waiting._engine.abort_request(["gone/one"])
    assert not waiting._engine.has_unfinished_requests()


def test_a_group_waits_for_room_for_all_of_it(source, adapters):
    """Others leave one by one: whoever took each free slot alone would be marked each time."""
    busy = VllmDecoder(source, adapters, batch_size=1, max_model_len=128)  # three slots
    ids = busy._prompter.prompt_ids("Hello")
    for number in range(9):
        params = SamplingParams(temperature=0.0, max_tokens=5 + number, detokenize=False, ignore_eos=True)
        busy._engine.add_request(f"plain{number}", {"prompt_token_ids": ids}, params)
        if number == 5:
            lanes_of(busy, "group", ["base", "one"])
    found = drained(busy)
    assert len(found) == 11 and all(len(found[f"plain{number}"].token_ids) == 5 + number for number in range(9))
    first, second = found["group/base"], found["group/one"]
    assert list(first.token_ids) == list(second.token_ids) and busy._mark not in first.token_ids


def test_an_adapter_that_vllm_would_apply_otherwise_is_refused(source, adapters, tmp_path):
    """vLLM reads neither `alpha_pattern` nor how an adapter began."""
    for name, change, said in (
        ("pattern", {"alpha_pattern": {"q_proj": 16}}, "no plain LoRA adapter"),
        ("changed", {"init_lora_weights": "pissa"}, "changes its base"),
    ):
        shutil.copytree(adapters["one"], tmp_path / name)
        told = json.loads((tmp_path / name / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(told | change))
        with pytest.raises(UserError, match=said):
            VllmDecoder(source, {"one": tmp_path / name}, batch_size=1)
    with pytest.raises(UserError, match="holds no adapter"):
        VllmDecoder(source, {"one": tmp_path / "nothing"}, batch_size=1)


def test_an_adapter_with_biases_is_refused(source, adapters, tmp_path):
    shutil.copytree(adapters["one"], tmp_path / "biased")
    config = json.loads((tmp_path / "biased" / "adapter_config.json").read_text())
    (tmp_path / "biased" / "adapter_config.json").write_text(json.dumps(config | {"lora_bias": True}))
    tensors = load_file(tmp_path / "biased" / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith(".lora_B.weight"))
    tensors[name.replace("weight", "bias")] = torch.ones(len(tensors[name]))
    save_file(tensors, tmp_path / "biased" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"has biases.*decoding\.engine=transformers"):
        VllmDecoder(source, {"biased": tmp_path / "biased"}, batch_size=1)


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_without_bfloat16_computes_in_float32_here_too(source, monkeypatch, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    chosen = settings(replace(source, dtype="auto"), {}, [], 1)["dtype"]
    assert chosen == ("bfloat16" if native else "float32")
    assert settings(replace(source, dtype="float16"), {}, [], 1)["dtype"] == "float16"


def test_a_version_of_vllm_that_was_not_tested_is_one_sentence_and_no_refusal(source, monkeypatch):
    monkeypatch.setattr("pipeline.decoding.vllm.settings.TESTED", ("0.99",))
    with pytest.warns(UserWarning, match=r"vLLM is 0\.32\.\d+, and tested are 0\.99\.x: if it does not start"):
        assert settings(source, {}, [], 1)["max_num_seqs"] == 1


def test_an_engine_that_could_lose_lanes_unseen_does_not_start(source, adapters):
    with pytest.raises(Exception, match="computed in pieces need vLLM's --scheduler-cls"):
        VllmDecoder(source, adapters, batch_size=2, max_model_len=128, scheduler_cls=None)


def test_prompts_in_pieces_and_from_the_cache_give_the_same_texts(source, adapters, reference):
    """Lanes reach the end of their prompts in different steps: other adapters have other pages in the cache."""
    pieces = VllmDecoder(source, adapters, batch_size=3, max_model_len=256, max_num_batched_tokens=64, block_size=32)
    begun = []
    begin = pieces._begin
    pieces._begin = lambda group: begun.append(group.part) or begin(group)
    prompts = ["Why? " * 60, "Why? " * 59 + "Hello", "Hello", "Name something good. " * 9]
    for weights in POINTS[1:]:  # one after the other: what the base has cached, an adapter has not
        requests = [Request(prompt, weights, temperature=0.8, max_new_tokens=12) for prompt in prompts]
        same(dict(pieces.generate(requests)), dict(reference.generate(requests)))
    assert max(map(len, (pieces._prompter.prompt_ids(prompt) for prompt in prompts))) > 64
    assert not any(begun), "a group lost a lane though there was room for all"


def test_a_long_prompt_beside_others_does_not_stop_them(source, adapters):
    """Lanes that draw go on in every step, whatever part of it prompts want."""
    beside = VllmDecoder(source, adapters, batch_size=3, max_model_len=256, max_num_batched_tokens=64)
    lanes_of(beside, "short", ["base", "one"], size=40)
    beside._engine.step()
    ids = beside._prompter.prompt_ids("Why? " * 60)
    for number in range(3):
        params = SamplingParams(temperature=0.0, max_tokens=4, detokenize=False, ignore_eos=True)
        beside._engine.add_request(f"long{number}", {"prompt_token_ids": [5 + number, *ids[1:]]}, params)
    found = drained(beside)
    first, second = found["short/base"], found["short/one"]
    assert list(first.token_ids) == list(second.token_ids) and beside._mark not in first.token_ids


def test_when_held_lanes_have_taken_all_of_the_cache_the_last_group_is_let_go(monkeypatch):
    """Else the engine would wait for room that nobody leaves."""
    scheduled = iter([5, 0, 0])
    stock = lambda *_: SimpleNamespace(total_num_scheduled_tokens=next(scheduled))  # noqa: E731
    monkeypatch.setattr("vllm.v1.core.sched.scheduler.Scheduler.schedule", stock)
    scheduler = GroupScheduler.__new__(GroupScheduler)
    scheduler.running, scheduler.waiting, scheduler.kv_holding_waiting = [], [], []
    scheduler.max_num_active_reqs = scheduler.max_num_scheduled_tokens = 8
    lanes = {name: [SimpleNamespace(held=True, num_tokens=9, num_computed_tokens=at) for at in (9, 0)] for name in "ab"}
    scheduler._held, scheduler._chunked = dict(lanes), True
    held = []
    for _ in range(3):
        scheduler.schedule()
        held.append([name for name in lanes if all(lane.held for lane in lanes[name])])
    assert held == [["a", "b"], ["a"], []]


def test_two_groups_in_a_cache_for_one_come_one_after_the_other(source, adapters):
    requests = [Request(f"{name}? " * 40, {"one": 1.0}, temperature=0.0, max_new_tokens=8) for name in ("Why", "How")]
    length = max(len(source.prompter().prompt_ids(request.prompt)) for request in requests)
    blocks = 2 * -(-(length + 8) // 32)  # of one group
    full = VllmDecoder(
        source, adapters, batch_size=2, max_model_len=256, max_num_batched_tokens=64, block_size=32,
        num_gpu_blocks_override=blocks + 2, enable_prefix_caching=False,
    )  # fmt: skip
    full._budget = 10**6  # the frontend lets both in at once, and vLLM too while little of them is computed
    expected = dict(GuidedDecoder.load(source, adapters, device="cpu").generate(requests))
    same(dict(full.generate(requests)), expected)


def test_the_generate_stage_runs_on_vllm_and_keeps_its_rows_apart(source, adapters, compose_params, workspace):
    params = compose_params(
        "experiment=smoke", "decoding.engine=vllm", "decoding.batch_size=4", "+models.tiny.dtype=float32"
    )
    fetch("tiny", replace(params.models["tiny"], location=str(source.folder)), workspace.model("tiny"))
    for objective, name in (("positivity", "one"), ("conciseness", "two")):
        shutil.copytree(adapters[name], workspace.arm(objective))
    rows = generate_sweep(params, workspace, "tiny", PROMPTS)
    assert len(rows) == len(PROMPTS) * len(params.sweep.points)
    assert all(math.isfinite(row.kl) and row.kl > -1e-3 for row in rows)
    assert {row.kl for row in rows if row.point == "base"} == {0.0}
    slower = replace(params, decoding=replace(params.decoding, engine="transformers"))
    generate_sweep(slower, workspace, "tiny", PROMPTS)
    stored = (workspace.scratch / "store" / "generate.jsonl").read_text().splitlines()
    assert len(stored) == 2 * len(rows), "an engine's rows are its own"


def marked(one, two, home):
    """Two adapters of one B, marked as one ARM for all mixes."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for name, tensors in (("one", first), ("two", first | {key: second[key] for key in second if ".lora_A." in key})):
        shutil.copytree(one, home / name)
        header = {"format": "pt", HEADER: "m"}
        save_file(tensors, home / name / "adapter_model.safetensors", metadata=header)
    return {name: home / name for name in ("one", "two")}


@pytest.fixture(scope="module")
def mixture(adapters, tmp_path_factory):
    return marked(*adapters.values(), tmp_path_factory.mktemp("mixture"))


@pytest.mark.parametrize("beside", [False, True])
def test_one_arm_for_all_mixes_has_one_lane_whatever_it_mixes(source, mixture, small, tmp_path, beside):
    """More mixes than slots: those in excess wait."""
    arms, arm_base = mixture, None
    if beside:  # adapters of another model, which the engine does not know
        arm_base = small
        arms = marked(*(adapted(small, tmp_path / name, seed) for seed, name in enumerate("ab")), tmp_path)
    reference = GuidedDecoder.load(source, arms, arm_base=arm_base, device="cpu")
    weights = [{"one": share / 6, "two": 1 - share / 6} for share in range(7)] + [{}, {"one": 0.4, "two": 0.4}]
    asked = some([Request(prompt, one, max_new_tokens=12) for prompt in PROMPTS[:2] for one in weights], 5)
    decoder = VllmDecoder(source, arms, arm_base=arm_base, batch_size=2, max_model_len=256)
    config = decoder._engine.vllm_config.lora_config
    assert beside or config.max_loras < len(weights)
    found, expected = dict(decoder.generate(asked)), dict(reference.generate(asked))
    same(found, expected)
    lanes = [2 if len(request.arms) == 2 else None for request in asked]
    assert [found[place].forwards for place in range(len(asked))] == [
        count and count * len(found[place].tokens) for place, count in enumerate(lanes)
    ]
    assert not any(decoder._adapters._used.values()), "all were given back"


def test_adapters_of_a_mixture_come_and_go_together(mixture, adapters, tmp_path, monkeypatch):
    loaded = {name: LoRARequest(name, number, str(folder)) for number, (name, folder) in enumerate(mixture.items(), 1)}
    lanes = Adapters(loaded, [])
    monkeypatch.setattr("pipeline.decoding.vllm.adapters._KEPT", 2)
    request = Request("Why?", {"one": 1.0, "two": 3.0})
    inside, beside = lanes.lanes(request)
    mixed = "0.25 one + 0.75 two"
    assert (inside, beside) == ({"base": 1.0, mixed: 4.0}, {})

    def taken(lane):
        lanes.take(lane)
        return lanes.find(lane)

    assert taken("base") is None and taken("one") is loaded["one"]
    first = taken(mixed)
    assert Adapters(loaded, []).find(mixed).lora_int_id == first.lora_int_id > len(loaded), "the same in any process"
    names = [f"{share} one + {1 - share:.6g} two" for share in (0.1, 0.2, 0.3)]
    others = [taken(name) for name in names]
    for name in names:
        lanes.give_back(name)
    assert [Path(other.lora_path).is_dir() for other in others] == [False, True, True], "the newest two that are idle"
    assert Path(first.lora_path).is_dir(), "it is in use"
    assert taken(mixed) is first
    alone = {"two": LoRARequest("two", 3, str(adapters["two"]))}
    assert not lanes.fit(alone) and lanes.fit({"one": loaded["one"]})
    for name in mixture:  # trained again
        shutil.copytree(mixture[name], tmp_path / name)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        header = {"format": "pt", HEADER: "another"}
        save_file(tensors, tmp_path / name / "adapter_model.safetensors", metadata=header)
    anew = {name: LoRARequest(name, number, str(tmp_path / name)) for number, name in enumerate(mixture, 4)}
    assert not lanes.fit({"one": anew["one"]}) and lanes.fit(anew)
    lanes.exchange(anew)
    assert not Path(first.lora_path).is_dir() and taken("one") is anew["one"]
    assert taken(mixed).lora_int_id != first.lora_int_id


def test_merging_what_is_no_mixture_is_refused(adapters, tmp_path):
    with pytest.raises(UserError, match="are marked as one ARM for all mixes and are not: train it anew"):
        merge({adapters["one"]: 0.5, adapters["two"]: 0.5}, tmp_path / "merged")
