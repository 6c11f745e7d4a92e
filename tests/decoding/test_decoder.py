import warnings
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import chisquare
from transformers import AutoTokenizer

from pipeline.config.errors import UserError
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.batch import Batch, guided_logps
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.models.loading import Source, load_model
from tests.reference import CPU, POINTS, PROMPTS, Reference, requests, run
from tests.tiny import tiny_model, write_tiny


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.0])
def test_decoder_equals_an_independent_float64_loop(decoder, reference, monkeypatch, temperature):
    wanted, steps = requests(temperature=temperature), []
    guided = guided_logps
    monkeypatch.setattr(
        "pipeline.decoding.batch.guided_logps", lambda *given: steps.append(guided(*given)) or steps[-1].clone()
    )
    for request in wanted:
        steps.clear()
        (row,) = run(decoder, [request])
        tokens, sums, laws = reference.row(request)
        assert row.tokens == tokens
        for step, law in zip(steps, laws, strict=True):
            np.testing.assert_allclose(step[0].numpy(), law, atol=1e-4, rtol=0)
        np.testing.assert_allclose([row.logp, row.logp_base, row.kl], sums, atol=1e-4 * len(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_order_and_neighbours_change_nothing_but_ties(tiny, prompter, arms, dtype):
    model = load_model(tiny, dtype, CPU)
    wanted = [
        Request(request.prompt, request.weights, max_new_tokens=3 + place % 7, sample=place // 5)
        for place, request in enumerate(requests() * 3)
    ]
    base, changed = Backbone(model, prompter, arms), {}
    alone = run(GuidedDecoder(base, batch_size=1), wanted)
    for size in (2, 5, 8, 64):
        for order in (1, -1):
            rows = run(GuidedDecoder(base, batch_size=size), wanted[::order])[::order]
            changed[size, order] = sum(one.tokens != other.tokens for one, other in zip(alone, rows, strict=True))
            for one, other in zip(alone, rows, strict=True):
                if one.tokens == other.tokens:
                    assert other.kl == pytest.approx(one.kl, abs=1e-3)
    print(f"{dtype}: rows of {len(wanted)} that changed with the batch around them: {changed}")
    assert max(changed.values()) <= (0 if dtype == torch.float64 else 1)


def test_draws_follow_the_guided_law(decoder, reference, prompter):
    request = Request(PROMPTS[0], {"one": 0.3, "two": 0.2}, temperature=2.0, max_new_tokens=1)
    _, law = reference.laws(request, [])
    wide = GuidedDecoder(decoder._backbones[0], batch_size=5000)
    rows = run(wide, [Request(request.prompt, request.weights, 2.0, max_new_tokens=1, sample=n) for n in range(20_000)])
    counts = np.bincount([row.tokens[0] for row in rows], minlength=prompter.vocab_size)
    expected = np.exp(law) * len(rows)
    likely = expected >= 5
    observed = [*counts[likely], counts[~likely].sum()]
    found = chisquare(observed, [*expected[likely], expected[~likely].sum()])
    print(f"20,000 draws over {len(observed)} cells: chi-square p = {found.pvalue:.3f}")
    assert len(observed) > 50
    assert found.pvalue > 0.001


@pytest.mark.parametrize("prompts", [1, 5])
def test_waiting_rows_take_the_places_of_ended_ones(decoder, monkeypatch, prompts):
    wanted = [Request(PROMPTS[n % prompts], max_new_tokens=2 if n % 3 else 20, sample=n) for n in range(32)]
    widths, step = [], Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: widths.append(batch.alive) or step(batch))
    total = sum(len(row.tokens) for row in run(decoder, wanted))
    assert max(widths) == 8
    assert total / 8 <= len(widths) <= total / 8 + 20  # batches without refilling would take 4 * 20 = 80 steps
    assert total / 8 + 20 < 70


def test_two_generations_at_once_do_not_disturb_each_other(decoder):
    first, second = requests(prompts=PROMPTS[:2]), requests(prompts=PROMPTS[2:4])
    apart = [run(decoder, first), run(decoder, second)]
    both = zip(decoder.generate(first), decoder.generate(second), strict=True)
    found = [dict(rows) for rows in zip(*both, strict=True)]
    assert [[rows[index] for index in sorted(rows)] for rows in found] == apart


def test_an_arm_at_zero_leaves_outputs_identical(tiny, arms, prompter, base, decoder):
    two = {name: arms[name] for name in ("one", "two")}
    plain = run(GuidedDecoder(Backbone(base, prompter, two)), requests(points=[{"one": 0.5, "two": 0.5}]))
    assert plain == run(decoder, requests(points=[{"one": 0.5, "two": 0.5, "three": 0.0}]))


def test_no_weights_is_the_base_and_has_no_divergence(decoder):
    for row in run(decoder, requests(points=[{}])):
        assert row.kl == pytest.approx(0, abs=1e-4)
        assert row.logp == pytest.approx(row.logp_base, abs=1e-4)


def test_a_uniform_arm_is_the_base(base, prompter, decoder):
    uniform = tiny_model(prompter.vocab_size)
    torch.nn.init.zeros_(uniform.get_input_embeddings().weight)
    guided = GuidedDecoder(Backbone(base, prompter), Backbone(uniform.eval(), prompter, name="uniform"))
    rows = run(guided, requests(points=[{"uniform": 2.0}]))
    for row in rows:
        assert row.kl == pytest.approx(0, abs=1e-4)
        assert row.logp == pytest.approx(row.logp_base, abs=1e-4)
    greedy = [
        run(each, requests(points=[point], temperature=0.0))
        for each, point in ((guided, {"uniform": 2.0}), (decoder, {}))
    ]
    assert [row.tokens for row in greedy[0]] == [row.tokens for row in greedy[1]]


def test_the_base_as_its_own_arm_is_the_base_at_half_the_temperature(base, prompter, reference):
    guided = GuidedDecoder(Backbone(base, prompter), Backbone(base, prompter, name="itself"))
    for request in requests(points=[{"itself": 1.0}]):
        (row,) = run(guided, [request])
        sums = np.zeros(2)
        for place, token in enumerate(row.tokens):
            law, sharp = reference.laws(Request(request.prompt, temperature=0.5), row.tokens[:place])
            sums += [sharp[token], law[token]]
        np.testing.assert_allclose([row.logp, row.logp_base], sums, atol=1e-4 * len(row.tokens))


def test_a_model_of_its_own_guides_like_the_adapter_merged_into_it(tiny, arms, prompter, decoder, tmp_path):
    merged = PeftModel.from_pretrained(load_model(tiny, torch.float32, CPU), str(arms["one"])).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "merged")
    folders = {"one": tmp_path / "merged", "two": arms["two"]}
    mixed = GuidedDecoder.load(Source(tiny, dtype="float32"), folders, device="cpu", batch_size=4)
    assert [backbone.lanes for backbone in mixed._backbones] == [("base", "two"), ("one",)]
    wanted = requests(points=[{}, {"one": 0.7}, {"one": 0.5, "two": 0.5}])
    for one, other in zip(run(mixed, wanted), run(decoder, wanted), strict=True):
        assert one.tokens == other.tokens
        assert one.kl == pytest.approx(other.kl, abs=1e-3)


def test_unknown_arm_and_long_prompt_are_refused_before_anything_runs(decoder):
    with pytest.raises(UserError, match="weights name four, but the ARMs are one, two, three"):
        list(decoder.generate(requests(points=[{"four": 1.0}])))
    with pytest.raises(UserError, match="context of 256"):
        list(decoder.generate([Request("word " * 300, max_new_tokens=8)]))


class Full:
    """Makes the base's head raise like an exhausted allocator as long as too many rows go through it."""

    def __init__(self, decoder, error, limit):
        self.error, self.limit, self.faults = error, limit, 0
        decoder._backbones[0].adapted.model.get_output_embeddings().register_forward_pre_hook(self.check)

    def check(self, _module, given):
        if len(given[0]) > self.limit:
            self.faults += 1
            raise self.error


CPU_FULL = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), CPU_FULL])
def test_out_of_memory_halves_the_batch_once_and_says_so(decoder, error):
    wanted = requests(points=POINTS[:2])  # eight rows are twelve block rows
    expected = [row.tokens for row in run(decoder, wanted)]
    full = Full(decoder, error, limit=8)
    with pytest.warns(UserWarning, match="half the batch, 4 rows"):
        assert [row.tokens for row in run(decoder, wanted)] == expected
    assert full.faults == 1
    full.limit = 1
    with pytest.raises(UserError, match=r"batch of 4 rows: lower decoding\.batch_size"):
        run(decoder, wanted)


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(decoder):
    Full(decoder, RuntimeError("shape mismatch"), limit=0)
    with pytest.raises(RuntimeError, match="shape mismatch"), warnings.catch_warnings():
        warnings.simplefilter("error")
        run(decoder, requests())


def test_a_decoder_left_half_way_starts_clean(decoder):
    expected = run(decoder, requests())
    generating = decoder.generate(requests())
    list(islice(generating, 3))
    generating.close()
    assert [row.tokens for row in run(decoder, requests())] == [row.tokens for row in expected]


def test_any_weights_of_base_and_arms_are_decoded_like_the_reference(decoder, reference):
    points = [{"base": 0.0, "one": 1.0}, {"base": 0.5, "one": 0.5}, {"one": 1.5, "two": -0.5}, {"base": 2.0}]
    wanted = requests(points=points, temperature=0.7)
    for request, row in zip(wanted, run(decoder, wanted), strict=True):
        tokens, sums, _ = reference.row(request)
        assert row.tokens == tokens
        np.testing.assert_allclose([row.logp, row.logp_base, row.kl], sums, atol=1e-3)


def test_a_model_alone_is_sampled_as_itself(tiny, arms, prompter, base, decoder):
    merged = PeftModel.from_pretrained(load_model(tiny, torch.float32, CPU), str(arms["one"])).merge_and_unload()
    alone = GuidedDecoder(Backbone(merged.eval(), prompter))
    for request in requests(points=[{"base": 0.0, "one": 1.0}]):
        plain = Request(request.prompt, max_new_tokens=6, temperature=0.0)
        same = Request(request.prompt, request.weights, max_new_tokens=6, temperature=0.0)
        assert run(alone, [plain])[0].tokens == run(decoder, [same])[0].tokens


def small_and_its_arm(folder):
    """Another model of the tiny base's vocabulary, and an adapter of it."""
    write_tiny(folder / "small", seed=9)
    adapted = get_peft_model(
        load_model(folder / "small", torch.float32, CPU),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for key, weight in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(str(folder / "arm"))
    return Source(folder / "small", dtype="float32"), folder / "arm"


def test_an_arm_of_another_model_guides_in_both_forms(tiny, prompter, tmp_path):
    small, arm = small_and_its_arm(tmp_path)
    decoder = GuidedDecoder.load(
        Source(tiny, dtype="float32"), {"small": arm}, arm_base=small, reference=True, device="cpu"
    )
    load = partial(load_model, dtype=torch.float64, device=CPU)
    experts = {
        "base": load(tiny), "reference": load(small.folder),
        "small": PeftModel.from_pretrained(load(small.folder), str(arm)).double().eval(),
    }  # fmt: skip
    reference = Reference.__new__(Reference)
    reference.base, reference.arms, reference.prompter = experts["base"], experts, prompter
    points = [{}, {"small": 1.0}, {"small": 2.0, "reference": -2.0}, {"base": 0.0, "small": 1.0}]
    wanted = requests(points=points)
    for request, row in zip(wanted, run(decoder, wanted), strict=True):
        assert row.tokens == reference.row(request)[0]
        assert row.kl == pytest.approx(reference.row(request)[1][2], abs=1e-3)


def test_the_log_ratio_of_an_untrained_arm_leaves_the_base_as_it_is(tiny, prompter, tmp_path):
    small, _ = small_and_its_arm(tmp_path)
    get_peft_model(
        load_model(small.folder, torch.float32, CPU),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).save_pretrained(str(tmp_path / "untrained"))
    decoder = GuidedDecoder.load(
        Source(tiny, dtype="float32"), {"small": tmp_path / "untrained"}, arm_base=small, reference=True, device="cpu"
    )
    for row in run(decoder, requests(points=[{"small": 3.0, "reference": -3.0}])):
        assert row.kl == pytest.approx(0.0, abs=1e-4)
        assert row.logp == pytest.approx(row.logp_base, abs=1e-3)
