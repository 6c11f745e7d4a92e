"""Rows in fixed shapes: the law and the rows of `BackboneSession`, in steps that could be replayed."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, MixtralConfig, Qwen2Config, Qwen3Config

from pipeline.decoding.backbone import Backbone, has_fixed_shapes
from pipeline.decoding.batch import Batch, guided_logps
from pipeline.decoding.cuda_graphs import ReplayedStep, fused_elementwise
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.logits_processor import GuidanceLogitsProcessor
from pipeline.decoding.static_cache import StaticSession, _rounded_columns, _rounded_slots
from pipeline.models.loading import load_model
from tests.decoding.test_kv_cache import SMALL
from tests.decoding.test_logits_processor import inputs
from tests.reference import CPU, POINTS, PROMPTS, requests, run

# Reading the device's numbers, or shapes that depend on them: neither can be in a graph.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique2", "item", "equal"}


def static(*backbones, **how):
    for backbone in backbones:
        backbone.static = True
    return GuidedDecoder(*backbones, **how)


@pytest.fixture
def fixed(base, prompter, arms):
    return static(Backbone(base, prompter, arms), batch_size=8)


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_fixed_shapes_draw_from_an_independent_float64_loop(fixed, reference, monkeypatch, temperature):
    steps, guided = [], guided_logps
    monkeypatch.setattr(
        "pipeline.decoding.batch.guided_logps", lambda *given: steps.append(guided(*given)) or steps[-1].clone()
    )
    for request in requests(temperature=temperature):
        steps.clear()
        (row,) = run(fixed, [request])
        tokens, sums, laws = reference.row(request)
        assert row.tokens == tokens
        for step, law in zip(steps, laws, strict=True):
            np.testing.assert_allclose(step[0].numpy(), law, atol=1e-4, rtol=0)
        np.testing.assert_allclose([row.logp, row.logp_base, row.kl], sums, atol=1e-4 * len(tokens))


@pytest.mark.parametrize(("dtype", "ties"), [(torch.float64, 0), (torch.float32, 1)])
def test_rows_are_those_of_the_eager_step_whatever_comes_and_goes(tiny, prompter, arms, dtype, ties):
    """Prompts of all lengths, rows that end early and late, several samples, points, truncation and refills."""
    model = load_model(tiny, dtype, CPU)
    wanted = [
        Request(prompt, POINTS[n % 4], top_k=n % 3, max_new_tokens=2 + 17 * (n % 5 == 0) + n % 7, sample=n)
        for n, prompt in enumerate([*PROMPTS, "Why? " * 30] * 8)
    ]
    eager = run(GuidedDecoder(Backbone(model, prompter, arms), batch_size=8), wanted)
    for size in (1, 3, 8, 64):
        rows = run(static(Backbone(model, prompter, arms), batch_size=size), wanted)
        changed = sum(one.tokens != other.tokens for one, other in zip(eager, rows, strict=True))
        print(f"{dtype}, batch {size}: {changed} of {len(wanted)} rows differ")
        assert changed <= ties
        for one, other in zip(eager, rows, strict=True):
            if one.tokens == other.tokens:
                assert (other.kl, other.logp) == pytest.approx((one.kl, one.logp), abs=1e-3)


@pytest.mark.parametrize("config", [Qwen2Config(**SMALL), Qwen3Config(**SMALL, head_dim=8)], ids=lambda c: c.model_type)
def test_other_architectures_far_beyond_the_first_columns(config, prompter, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(str(tmp_path / "arm"))
    wanted = [Request(prompt, {"arm": 0.5}, temperature=0.7, max_new_tokens=90) for prompt in PROMPTS]
    eager = run(GuidedDecoder(Backbone(model, prompter, {"arm": tmp_path / "arm"})), wanted)
    rows = run(static(Backbone(model, prompter, {"arm": tmp_path / "arm"})), wanted)
    assert [row.tokens for row in rows] == [row.tokens for row in eager]


def test_models_whose_shapes_or_kernels_depend_on_the_data_keep_the_eager_step():
    long = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    plain = AutoModelForCausalLM.from_config(Qwen2Config(**SMALL))
    assert has_fixed_shapes(plain)
    for config in (MistralConfig(**SMALL, sliding_window=8), MixtralConfig(**SMALL), Qwen2Config(**SMALL, **long)):
        assert not has_fixed_shapes(AutoModelForCausalLM.from_config(config))
    plain.hf_device_map = {"": 0}
    assert not has_fixed_shapes(plain)
    eager = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=500))
    eager.set_attn_implementation("eager")
    assert not has_fixed_shapes(eager)


def test_models_of_their_own_guide_in_fixed_shapes_too(base, prompter, arms, decoder):
    own = [Backbone(base, prompter), Backbone(base, prompter, arms, name=None)]
    for one, other in zip(run(static(*own), requests()), run(decoder, requests()), strict=True):
        assert one.tokens == other.tokens and one.kl == pytest.approx(other.kl, abs=1e-3)


def test_a_processor_steps_in_fixed_shapes(base, prompter, arms):
    made = []
    for fixed_shapes in (False, True):
        backbone = Backbone(base, prompter, arms, name=None)
        backbone.static = fixed_shapes
        guidance = GuidanceLogitsProcessor(prompter, {"one": 0.5, "two": 0.5}, backbone)
        how = {"do_sample": False, "max_new_tokens": 12, "logits_processor": [guidance]}
        made.append(base.generate(**inputs(prompter, PROMPTS), **how))
    assert torch.equal(*made)


class Recorded(TorchDispatchMode):
    """Every operation with the shapes and numbers that it is given, and where fixed memory lies."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        told = [(one.shape, one.stride(), one.dtype) if isinstance(one, torch.Tensor) else one for one in flat]
        self.operations.append((str(func), told))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_a_step_is_the_same_operations_on_the_same_shapes_and_never_looks_at_a_number(fixed):
    """What a replayed graph needs, and a length that slipped in as a Python number would break."""
    rows, made = fixed._rows(requests(max_new_tokens=20)), Batch(fixed._backbones, fixed._vocab_size)
    made.admit_rows(rows)
    made.step()
    (lanes,) = made._lanes.values()
    memory = [layer.keys.data_ptr() for layer in lanes._layers]
    steps = []
    for _ in range(3):
        made.step()
        with Recorded() as recorded:
            lanes._forward(lanes._token_ST[1])
        steps.append(recorded.operations)
    assert len(steps[0]) > 100 and steps[0] == steps[1] == steps[2]
    names = {name.split(".")[1] for name, _ in steps[0]}
    assert "index_put_" in names and not names & WAITING
    assert memory == [layer.keys.data_ptr() for layer in lanes._layers]


def test_shapes_change_seldom_and_memory_does_not_grow(fixed, monkeypatch):
    moves, steps, move, step = [], [], StaticSession._move, StaticSession.step

    def counted(lanes, *given):
        move(lanes, *given)
        moves.append((len(lanes._slots), lanes._columns))

    monkeypatch.setattr(StaticSession, "_move", counted)
    monkeypatch.setattr(StaticSession, "step", lambda lanes, tokens: steps.append(1) or step(lanes, tokens))
    wide = GuidedDecoder(*fixed._backbones, batch_size=32)
    run(wide, [Request(PROMPTS[0], {"one": 1.0}, max_new_tokens=2 + n % 40, sample=n) for n in range(400)])
    print(f"{len(steps)} steps, shapes: {moves}")
    assert len(steps) > 200 and len(moves) < len(steps) / 20
    assert max(moves) == (64, 128) and min(moves) == (32, 64)  # 32 rows of two lanes each


def test_a_slot_that_is_free_or_whose_row_has_ended_never_leaves_the_context(tiny, prompter, arms):
    model = load_model(tiny, torch.float32, CPU)
    model.config.max_position_embeddings = 40
    backbone = Backbone(model, prompter, arms)
    short = [Request("Why?", max_new_tokens=2 if n else 30, sample=n) for n in range(8)]
    one, other = (run(decoder, short) for decoder in (GuidedDecoder(backbone), static(backbone)))
    assert [row.tokens for row in one] == [row.tokens for row in other]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(count=st.integers(1, 200_000))
def test_rounding_wastes_a_quarter_at_most(count):
    slots = _rounded_slots(count)
    assert count <= slots < count + 8 and (slots == count or slots % 8 == 0)
    for few, unit in ((1, 256), (9, 64)):
        columns = _rounded_columns(count, few)
        assert columns % unit == 0 and count <= columns < count + max(unit, count / 4)


def test_fused_functions_are_exchanged_for_the_time_of_a_step_only(base, monkeypatch):
    calls, (ids,) = [], [torch.tensor([[7, 8, 9]])]
    before, rotary = base(ids).logits, base.model.layers[0].self_attn.forward.__globals__["apply_rotary_pos_emb"]

    def watched(function):
        return lambda *given: calls.append(function.__name__) or function(*given)

    monkeypatch.setattr("pipeline.decoding.cuda_graphs._compiled", watched)
    with fused_elementwise(base):
        torch.testing.assert_close(base(ids).logits, before, rtol=0, atol=0)
    assert calls.count("forward") == 5 and calls.count("apply_rotary_pos_emb") == 2  # two layers
    with pytest.raises(ZeroDivisionError), fused_elementwise(base):
        raise ZeroDivisionError
    base(ids)
    assert len(calls) == 7
    assert base.model.layers[0].self_attn.forward.__globals__["apply_rotary_pos_emb"] is rotary


def test_off_a_gpu_a_step_is_the_function_itself():
    calls = []
    step = ReplayedStep(lambda: calls.append(1) or torch.zeros(1), CPU)
    for _ in range(3):
        step()
    assert len(calls) == 3


def test_a_session_is_taken_over_with_its_memory_and_its_step(fixed):
    (backbone,) = fixed._backbones
    wanted = requests(points=[{"one": 1.0}])
    expected = [row.tokens for row in run(GuidedDecoder(backbone, batch_size=2), wanted)]
    (session,) = backbone.idle
    step = session._steps[1, True]
    assert [row.tokens for row in run(GuidedDecoder(backbone, batch_size=2), wanted)] == expected
    run(GuidedDecoder(backbone, batch_size=2), requests(points=[{}]))
    assert backbone.idle == [session] and session._steps[1, True] is step, "the same shapes are captured once"
    assert session._steps.keys() == {(1, False), (1, True)}
    generating = fixed.generate(wanted)
    next(generating)
    assert not backbone.idle, "two generations at once have sessions of their own"
    generating.close()
    assert len(backbone.idle) == 1
    assert [row.tokens for row in run(GuidedDecoder(backbone, batch_size=2), wanted)] == expected


def test_a_session_that_an_error_left_half_way_is_not_taken_over(fixed, monkeypatch):
    (backbone,) = fixed._backbones
    run(fixed, requests(points=[{}]))
    assert backbone.idle
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("pipeline.decoding.batch.draw", lambda *_: 1 / 0)
        run(fixed, requests())
    assert not backbone.idle


def test_long_prompts_are_read_in_pieces(fixed, decoder, monkeypatch):
    expected = run(decoder, requests())
    monkeypatch.setattr("pipeline.decoding.static_cache._AT_ONCE", 24)
    read, prompts = [], StaticSession._prompts

    def measured(lanes, asked):
        read.append([len(prompt) for _, prompt in asked])
        return prompts(lanes, asked)

    monkeypatch.setattr(StaticSession, "_prompts", measured)
    rows = run(fixed, requests())
    assert all(len(piece) == 1 or max(piece) * len(piece) <= 24 for piece in read) and max(map(len, read)) > 1
    assert [row.tokens for row in rows] == [row.tokens for row in expected]


def test_adapters_that_no_row_has_are_not_multiplied_with(fixed):
    with Recorded() as bare:
        run(fixed, requests(points=[{}], max_new_tokens=4))
    with Recorded() as adapted:
        run(fixed, requests(points=[{"one": 1.0}], max_new_tokens=4))
    assert not any("addmm_" in name for name, _ in bare.operations)
    assert any("addmm_" in name for name, _ in adapted.operations)


def test_models_read_on_before_tokens_are_looked_at_and_step_back_where_rows_come_and_go(fixed, decoder, monkeypatch):
    ahead, back, rewind, advance = [], [], StaticSession.rewind, Batch._advance
    monkeypatch.setattr(StaticSession, "rewind", lambda lanes, counts: back.append(1) or rewind(lanes, counts))
    monkeypatch.setattr(Batch, "_advance", lambda made: ahead.append(1) or advance(made))
    for backbone in (*fixed._backbones, *decoder._backbones):
        backbone.ends |= set(range(100, 130))  # so that most rows end by themselves
    wanted = [Request(PROMPTS[n % 5], POINTS[n % 4], max_new_tokens=40, sample=n) for n in range(60)]
    rows = run(fixed, wanted)
    steps = len(ahead)
    assert len(back) > 10 and sum(row.finish == "eos" for row in rows) > 40
    assert [row.tokens for row in run(decoder, wanted)] == [row.tokens for row in rows]
    in_vain = steps - (len(ahead) - steps)
    assert len(back) <= in_vain <= len(back) + 2, "where rows come and go, and at the ends of two chunks"
