"""The guided decoder on a GPU: the same law, the same rows as on the CPU, whatever stands around them."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.points import REFERENCE
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.logits_processor import GuidanceLogitsProcessor
from pipeline.models.loading import load_model
from pipeline.models.prompting import Prompter
from tests.decoding import test_logits_processor
from tests.decoding.test_cross_tokenizer import log_ratio
from tests.foreign import foreign_model, sentencepiece
from tests.gpu.rows import changed
from tests.reference import CPU, POINTS, PROMPTS, requests, run


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.0])
def test_decoder_equals_an_independent_float64_loop(backbone_of, reference, static, temperature):
    wanted = requests(temperature=temperature)
    rows = run(GuidedDecoder(backbone_of(static=static), batch_size=8), wanted)
    for request, row in zip(wanted, rows, strict=True):
        tokens, sums, _ = reference.row(request)
        assert row.tokens == tokens
        np.testing.assert_allclose([row.logp, row.logp_base, row.kl], sums, atol=1e-3, rtol=0)


@pytest.mark.parametrize("how", [{}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_rows_draw_the_same_tokens_as_on_the_cpu(backbone_of, static, how):
    wanted = [
        Request(prompt, point, max_new_tokens=12, sample=sample, **how)
        for sample in range(3) for prompt in PROMPTS for point in POINTS
    ]  # fmt: skip
    here = run(GuidedDecoder(backbone_of(static=static), batch_size=16), wanted)
    there = run(GuidedDecoder(backbone_of(CPU), batch_size=16), wanted)
    assert changed(here, there, f"device and CPU, {how}") <= 1


def test_rows_that_take_the_places_of_others_are_what_they_are_alone(backbone_of, static):
    lengths = [1, 2, 3, 60, 5, 90, 8, 30]
    wanted = [
        Request(PROMPTS[n % 5], POINTS[n % 4], temperature=0.7, max_new_tokens=lengths[n % 8], sample=n)
        for n in range(40)
    ]
    backbone = backbone_of(static=static)
    together = run(GuidedDecoder(backbone, batch_size=8), wanted)
    alone = run(GuidedDecoder(backbone, batch_size=1), wanted)
    assert len({len(row.tokens) for row in alone}) > 5
    assert changed(together, alone, "eight at once and one at a time") <= 1


def test_a_mixture_draws_the_same_tokens_as_on_the_cpu_whatever_each_row_mixes(backbone_of, static):
    """Shares change from row to row and in a slot from row to row, while the step is replayed."""
    mixes = [{"one": share / 4, "two": 1 - share / 4} for share in range(5)]
    wanted = [
        Request(prompt, {name: 0.7 * share for name, share in mix.items() if share}, max_new_tokens=6 + 3 * place)
        for prompt in PROMPTS for place, mix in enumerate(mixes)
    ]  # fmt: skip
    found = []
    for backbone in (backbone_of(static=static), backbone_of(CPU)):
        backbone.mixtures = {"one": "m", "two": "m"}
        found.append(run(GuidedDecoder(backbone, batch_size=4), wanted))
    assert {row.forwards for row, request in zip(found[0], wanted, strict=True) if len(request.arms) == 1} == {None}
    assert changed(found[0], found[1], "a mixture, device and CPU") <= 1


@pytest.mark.parametrize("candidates", [64, 10**9])
@pytest.mark.filterwarnings("ignore:.*another tokenizer")
def test_arms_of_another_tokenizer_guide_as_on_the_cpu(backbone_of, device, static, candidates):
    tokenizer, found = sentencepiece(), []
    wanted = [
        Request(prompt, log_ratio(weights), max_new_tokens=10, seed=seed)
        for prompt in PROMPTS for weights in ({"one": 1.0}, {"one": 0.5, "two": 0.7}) for seed in (0, 1)
    ]  # fmt: skip
    for place, fixed in ((device, static), (CPU, False)):
        model: Any = foreign_model(len(tokenizer))
        base = Backbone(model.to(place), Prompter(tokenizer, None))
        base.static = fixed
        decoder = GuidedDecoder(base, backbone_of(place, static=fixed, name=REFERENCE), batch_size=8)
        decoder._bridge.candidates = candidates
        found.append(run(decoder, wanted))
    assert changed(found[0], found[1], "across tokenizers, device and CPU") <= 1
    assert [row.left_out for row in found[0]] == pytest.approx([row.left_out for row in found[1]], abs=1e-3)


def test_generate_and_the_decoder_choose_the_same_tokens(tiny, prompter, arms, device, static):
    model = load_model(tiny, torch.float32, device)
    arm, base = Backbone(model, prompter, arms, name=None), Backbone(model, prompter, arms)
    arm.static = base.static = static
    given = test_logits_processor.inputs(prompter)
    given |= {name: given[name].to(device) for name in ("input_ids", "attention_mask")}
    guidance = GuidanceLogitsProcessor(prompter, test_logits_processor.WEIGHTS, arm)
    found = model.generate(**given, do_sample=False, max_new_tokens=12, logits_processor=[guidance])
    wanted = [
        Request(prompt, test_logits_processor.WEIGHTS, temperature=0.0, max_new_tokens=12)
        for prompt in test_logits_processor.PROMPTS
    ]
    for tokens, row in zip(found, run(GuidedDecoder(base), wanted), strict=True):
        assert tokens[given["input_ids"].shape[1] :].tolist()[: len(row.tokens)] == row.tokens


@pytest.mark.filterwarnings("ignore:.*another tokenizer")
def test_generate_is_guided_across_tokenizers_too(backbone_of, device, static):
    tokenizer = sentencepiece()
    prompter, model = Prompter(tokenizer, None), foreign_model(len(tokenizer)).to(device)
    base, arm = Backbone(model, prompter), backbone_of(static=static, name=REFERENCE)
    base.static = static
    weights = {"one": 1.0, REFERENCE: -1.0}
    guidance = GuidanceLogitsProcessor(prompter, weights, arm, prompts=["Tips?"])
    ids = torch.tensor([prompter.prompt_ids("Tips?")], device=device)
    found = model.generate(ids, do_sample=False, max_new_tokens=10, logits_processor=[guidance], pad_token_id=0)
    (row,) = run(GuidedDecoder(base, arm), [Request("Tips?", weights, temperature=0.0, max_new_tokens=10)])
    assert found[0, ids.shape[1] :].tolist()[: len(row.tokens)] == row.tokens


@pytest.mark.parametrize("length", [1, 3, None])
def test_drafted_rows_are_those_of_the_cpu_without_drafts(backbone_of, static, length):
    wanted = [
        Request(prompt, point, max_new_tokens=3 + 17 * (sample % 2), sample=sample)
        for sample in range(3) for prompt in PROMPTS for point in POINTS
    ]  # fmt: skip

    def decoder(drafted, *where, **how):
        return GuidedDecoder(
            backbone_of(*where, adapters={}, **how), backbone_of(*where, name=REFERENCE, **how), batch_size=4,
            num_speculative_tokens=drafted,
        )  # fmt: skip

    here, there = run(decoder(length, static=static), wanted), run(decoder(0, CPU), wanted)
    print(f"{sum(row.accepted for row in here)} of {sum(row.drafted for row in here)} drafted tokens accepted")
    assert changed(here, there, f"device with {length} drafted and CPU") <= 1
