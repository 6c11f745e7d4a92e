import copy
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, MistralConfig, Qwen2Config

from pipeline import batch, models
from pipeline.config import UserError
from pipeline.decoder import GuidedDecoder, Request
from pipeline.guidance import random_stream
from pipeline.lanes import Backbone, Lanes
from pipeline.models import Prompter
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [
    "Describe a rainy Monday.", "Describe a rainy Monday. Why?", "Tips?",
    "Write a review of the corner bakery near the station.", "Why?",
]  # fmt: skip
POINTS = [{}, {"one": 1.0}, {"one": 0.5, "two": 0.5}, {"two": 0.3, "three": 0.9}]
CPU = torch.device("cpu")


def requests(prompts=PROMPTS, points=POINTS, **how):
    how = {"max_new_tokens": 6, **how}
    return [Request(prompt, point, **how) for prompt in prompts for point in points]


def run(decoder, wanted):
    rows = dict(decoder.generate(wanted))
    assert sorted(rows) == list(range(len(wanted)))
    return [rows[index] for index in range(len(wanted))]


@pytest.fixture
def decoder(base, prompter, arms):
    return GuidedDecoder(Backbone(base, prompter, arms), batch_size=8)


def log_softmax(values):
    values = values - values.max()
    return values - np.log(np.exp(values).sum())


class Reference:
    """The decoding rule once more: float64, one row, PEFT's own forward, no cache, numpy arithmetic."""

    def __init__(self, tiny, arms, prompter):
        self.base = models.load_model(tiny, torch.float64, CPU)
        fresh = {name: models.load_model(tiny, torch.float64, CPU) for name in arms}
        self.arms = {
            name: PeftModel.from_pretrained(fresh[name], str(folder)).double().eval() for name, folder in arms.items()
        }
        self.prompter = prompter

    @torch.no_grad()
    def laws(self, request, tokens):
        """The base's and the guided next-token log-probabilities after a prompt and `tokens`."""
        ids = torch.tensor([self.prompter.prompt_ids(request.prompt) + tokens])
        experts = [(1.0, self.base), *((alpha, self.arms[name]) for name, alpha in request.weights.items())]
        each = [log_softmax(model(ids).logits[0, -1, : self.prompter.vocab_size].numpy()) for _, model in experts]
        total = sum(alpha * logps for (alpha, _), logps in zip(experts, each, strict=True))
        return each[0], log_softmax(total / (request.temperature or 1.0))

    def row(self, request):
        tokens, sums, laws = [], np.zeros(3), []
        for uniform in random_stream(request.stream, request.max_new_tokens):
            base, law = self.laws(request, tokens)
            if request.temperature:
                token = int(np.searchsorted(np.cumsum(np.exp(law)), uniform, side="right"))
                sums += [law[token], base[token], (np.exp(law) * (law - base)).sum()]
            else:
                token = int(law.argmax())
                sums += [0.0, base[token], -base[token]]
            tokens.append(token)
            laws.append(law)
            if token == self.prompter.eos:
                break
        return tokens, sums, laws


@pytest.fixture(scope="module")
def reference(tiny, arms, prompter):
    return Reference(tiny, arms, prompter)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.0])
def test_decoder_equals_an_independent_float64_loop(decoder, reference, monkeypatch, temperature):
    wanted, steps = requests(temperature=temperature), []
    guided = batch.guided_logps
    monkeypatch.setattr(batch, "guided_logps", lambda *given: steps.append(guided(*given)) or steps[-1].clone())
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
    model = models.load_model(tiny, dtype, CPU)
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


def test_prefill_reads_a_prompt_once_per_lane_for_all_its_rows(decoder, monkeypatch):
    read, reading = [], Lanes._read
    monkeypatch.setattr(
        Lanes, "_read", lambda self, lanes, prompts: read.extend(lanes) or reading(self, lanes, prompts)
    )
    run(decoder, requests(prompts=PROMPTS[:2]))
    assert sorted(read) == sorted(["base", "one", "two", "three"] * 2)


@pytest.mark.parametrize("prompts", [1, 5])
def test_waiting_rows_take_the_places_of_ended_ones(decoder, monkeypatch, prompts):
    wanted = [Request(PROMPTS[n % prompts], max_new_tokens=2 if n % 3 else 20, sample=n) for n in range(32)]
    widths, step = [], batch.Batch.step
    monkeypatch.setattr(batch.Batch, "step", lambda batch: widths.append(batch.alive) or step(batch))
    total = sum(len(row.tokens) for row in run(decoder, wanted))
    assert max(widths) == 8
    assert total / 8 <= len(widths) <= total / 8 + 20  # batches without refilling would take 4 * 20 = 80 steps
    assert total / 8 + 20 < 70


def test_memory_does_not_grow_with_finished_rows(decoder, monkeypatch):
    sizes, merge = [], Lanes._merge

    def measured(lanes, *given):
        merge(lanes, *given)
        sizes.append(sum(layer.rooms[0].numel() for layer in lanes._cache.layers))

    monkeypatch.setattr(Lanes, "_merge", measured)
    run(decoder, [Request(PROMPTS[0], {"one": 1.0}, max_new_tokens=2 + n % 3, sample=n) for n in range(200)])
    assert len(sizes) > 30
    assert max(sizes[15:]) <= max(sizes[:15])


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
    merged = PeftModel.from_pretrained(models.load_model(tiny, torch.float32, CPU), str(arms["one"])).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "merged")
    folders = {"one": tmp_path / "merged", "two": arms["two"]}
    mixed = GuidedDecoder.load(tiny, folders, dtype="float32", device="cpu", batch_size=4)
    assert [backbone.lanes for backbone in mixed._backbones] == [("base", "two"), ("one",)]
    wanted = requests(points=[{}, {"one": 0.7}, {"one": 0.5, "two": 0.5}])
    for one, other in zip(run(mixed, wanted), run(decoder, wanted), strict=True):
        assert one.tokens == other.tokens
        assert one.kl == pytest.approx(other.kl, abs=1e-3)


def test_every_model_is_asked_by_its_own_template(base, tiny, prompter):
    other = Prompter.load(tiny, "Q: {prompt} A:")
    guided = GuidedDecoder(Backbone(base, prompter), Backbone(base, other, name="arm"))
    request = Request(PROMPTS[0], {"arm": 1.0}, max_new_tokens=1, temperature=0)
    (row,) = run(guided, [request])
    logits = [base(torch.tensor([asked.prompt_ids(request.prompt)])).logits[0, -1] for asked in (prompter, other)]
    assert row.tokens == [int(sum(each.log_softmax(-1) for each in logits).argmax())]


def test_rows_end_at_eos_or_at_their_own_limit(decoder, prompter):
    wanted = [Request(PROMPTS[0], temperature=3.0, max_new_tokens=4 + n % 9, sample=n) for n in range(300)]
    finishes = set()
    for request, row in zip(wanted, run(decoder, wanted), strict=True):
        finishes.add(row.finish)
        if row.finish == "eos":
            assert row.tokens[-1] == prompter.eos and prompter.eos not in row.tokens[:-1]
        else:
            assert len(row.tokens) == request.max_new_tokens and prompter.eos not in row.tokens
    assert finishes == {"eos", "length"}


def test_a_stop_text_ends_a_row_and_is_left_out(decoder):
    free = run(decoder, requests(max_new_tokens=20))
    stops = ("a", " the", "er")
    halted = run(decoder, requests(max_new_tokens=20, stop=stops))
    assert {row.finish for row in halted} >= {"stop"}
    for before, after in zip(free, halted, strict=True):
        assert before.tokens[: len(after.tokens)] == after.tokens
        assert not any(stop in after.text for stop in stops)
        if after.finish == "stop":
            assert before.text.startswith(after.text)
            cut = decoder._backbones[0].prompter.spell(after.tokens[:-1])
            assert not any(stop in cut for stop in stops), "it ended one token late"


@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.3}, {"top_k": 1}, {"temperature": 0.0}])
def test_a_truncated_row_draws_only_what_the_law_keeps(decoder, reference, how):
    for request in requests(points=POINTS[1:3], **how):
        (row,) = run(decoder, [request])
        for place, token in enumerate(row.tokens):
            law = np.exp(reference.laws(request, row.tokens[:place])[1])
            rank, likelier = (law > law[token] + 1e-6).sum(), law[law > law[token] + 1e-6].sum()
            assert rank < (request.top_k if request.temperature else 1) or not (
                request.top_k or not request.temperature
            )
            assert likelier < request.top_p + 1e-4
            assert law[token] >= request.min_p * law.max() - 1e-6
        assert np.isfinite([row.logp, row.kl]).all()


def test_truncated_and_free_rows_share_a_batch(decoder):
    free, greedy = requests(prompts=PROMPTS[:1]), requests(prompts=PROMPTS[:1], temperature=0.0)
    together = run(decoder, free + greedy)
    assert [row.tokens for row in together] == [row.tokens for row in run(decoder, free) + run(decoder, greedy)]


@pytest.mark.parametrize(
    "how",
    [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.0}, {"max_new_tokens": 0}, {"stop": ("",)}],
)
def test_a_request_out_of_range_is_refused(how):
    with pytest.raises(UserError, match=f"a request's {next(iter(how))} is"):
        Request("Why?", **how)


def test_any_end_of_the_model_ends_a_row(base, prompter):
    token = run(GuidedDecoder(Backbone(base, prompter)), [Request("Why?", temperature=0.0, max_new_tokens=4)])[
        0
    ].tokens[1]
    base.generation_config.eos_token_id = [prompter.eos, token]
    (row,) = run(GuidedDecoder(Backbone(base, prompter)), [Request("Why?", temperature=0.0, max_new_tokens=9)])
    assert row.finish == "eos" and row.tokens.index(token) == len(row.tokens) - 1


SMALL = {
    "vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, sliding_window=8),
        Qwen2Config(**SMALL),
        Gemma2Config(**SMALL, head_dim=8, sliding_window=8),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_far_beyond_a_cache_s_first_room(config, prompter, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(str(tmp_path / "arm"))
    decoder = GuidedDecoder(Backbone(model, prompter, {"arm": tmp_path / "arm"}))
    wanted = [Request(prompt, {"arm": 0.5}, temperature=0.7, max_new_tokens=90) for prompt in PROMPTS]
    for request, row in zip(wanted, run(decoder, wanted), strict=True):
        prompt = prompter.prompt_ids(request.prompt)
        with torch.no_grad():
            base, arm = (
                each(torch.tensor([prompt + row.tokens])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                for each in (model, adapted.eval())
            )
        law, drawn = ((base + 0.5 * arm) / 0.7).log_softmax(-1), torch.tensor(row.tokens)[:, None]
        assert row.logp == pytest.approx(law.gather(1, drawn).sum().item(), abs=0.02)
        assert row.kl == pytest.approx((law.exp() * (law - base)).sum().item(), abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(tiny, prompter, arms, dtype, decoder):
    half = GuidedDecoder(Backbone(models.load_model(tiny, dtype, CPU), prompter, arms))
    wanted = requests(max_new_tokens=1, temperature=0.0)
    for one, other in zip(run(half, wanted), run(decoder, wanted), strict=True):
        assert one.kl == pytest.approx(other.kl, abs=0.5) or one.tokens != other.tokens
    agreed = sum(one.tokens == other.tokens for one, other in zip(run(half, wanted), run(decoder, wanted), strict=True))
    assert agreed >= 0.8 * len(wanted)


def test_unknown_arm_and_long_prompt_are_refused_before_anything_runs(decoder):
    with pytest.raises(UserError, match="weights name four, but the ARMs are one, two, three"):
        list(decoder.generate(requests(points=[{"four": 1.0}])))
    with pytest.raises(UserError, match="context of 256"):
        list(decoder.generate([Request("word " * 300, max_new_tokens=8)]))


def test_two_arms_of_one_name_are_refused(base, prompter, arms):
    with pytest.raises(UserError, match="two models are called one"):
        GuidedDecoder(Backbone(base, prompter, arms), Backbone(base, prompter, name="one"))
    with pytest.raises(UserError, match="two models are called base"):
        GuidedDecoder(Backbone(base, prompter), Backbone(base, prompter))
    with pytest.raises(UserError, match="has no lane base"):
        GuidedDecoder(Backbone(base, prompter, arms, name=None))


def test_an_arm_model_with_another_tokenizer_is_refused_by_name(base, prompter):
    foreign = Prompter(tiny_tokenizer(extra=["<other>"]), None)
    with pytest.raises(UserError, match="stranger: token 4 is '<other>'"):
        GuidedDecoder(Backbone(base, prompter), Backbone(base, foreign, name="stranger"))


@pytest.mark.parametrize("base_extra", [0, 61])
def test_padded_embeddings_and_a_pad_token_of_one_side_are_welcome(tiny, prompter, base_extra):
    grown = AutoTokenizer.from_pretrained(tiny)
    grown.add_special_tokens({"pad_token": "<extra-pad>"})
    wide, narrow = tiny_model(prompter.vocab_size + 61).eval(), tiny_model(prompter.vocab_size).eval()
    larger, smaller = Backbone(wide, Prompter(grown, None)), Backbone(narrow, prompter, name="arm")
    if base_extra == 0:
        larger, smaller = Backbone(narrow, prompter), Backbone(wide, Prompter(grown, None), name="arm")
    for row in run(GuidedDecoder(larger, smaller), requests(points=[{"arm": 1.0}])):
        assert all(token < prompter.vocab_size for token in row.tokens)


@pytest.mark.parametrize("guilty", ["base", "arm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_the_model_and_the_row(base, prompter, guilty, value):
    arm = tiny_model(prompter.vocab_size, seed=3).eval()
    decoder = GuidedDecoder(Backbone(base, prompter), Backbone(arm, prompter, name="arm"))
    wanted = requests(points=[{}, {"arm": 1.0}], max_new_tokens=20)
    spoiled, count = {"base": base, "arm": arm}[guilty], [0]
    backbone = decoder._backbones[0 if guilty == "base" else 1]
    assert spoiled is not backbone.adapted.model

    def spoil(_module, _given, output):
        count[0] += 1
        if count[0] > 3:
            output[1] = value
        return output

    backbone.adapted.model.get_output_embeddings().register_forward_hook(spoil)
    with pytest.raises(UserError, match=rf"^{guilty} gave logits that are not finite at token \d+ of the response to"):
        list(decoder.generate(wanted))


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


def test_template_text_is_used_instead_of_the_chat_template(tiny):
    plain = Prompter.load(tiny, "USER: {prompt} ASSISTANT:")
    assert plain.tokenizer.decode(plain.prompt_ids("Why?")) == "USER: Why? ASSISTANT:"
    with pytest.raises(UserError, match=r"has no \{prompt\}"):
        Prompter.load(tiny, "USER: ASSISTANT:")
