"""What models say on a GPU in each precision: beside PEFT, beside float32, and with each attention kernel."""

from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.models.loading import load_model
from tests.reference import PROMPTS, requests, run
from tests.tiny import tiny_model

RESPONSE = [7, 8, 9, 100, 200, 300, 11, 12]
HALF = [torch.bfloat16, torch.float16]


def divergence(found, wanted):
    """Mean KL of guided laws from others, in nats per token."""
    pairs = [(one.logps["guided"], other.logps["guided"]) for one, other in zip(found, wanted, strict=True)]
    return float(torch.cat([torch.linalg.vecdot(one.exp(), one - other) for one, other in pairs]).mean())


@pytest.fixture
def merged_laws(tiny, arms, prompter, device):
    """Per lane and prompt the laws along a response, by float32 models that PEFT has merged, each run alone."""

    @torch.no_grad()
    def laws(tokens):
        found = {}
        for name in ("base", *arms):
            model = load_model(tiny, torch.float32, device)
            if name != "base":
                model = PeftModel.from_pretrained(model, str(arms[name])).merge_and_unload()
            for prompt in PROMPTS:
                asked = prompter.prompt_ids(prompt)
                logits = model(torch.tensor([asked + tokens], device=device)).logits[0, len(asked) - 1 : -1]
                found[name, prompt] = logits.log_softmax(-1).cpu()
        return found

    return laws


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_adapters_in_one_batch_say_what_merged_models_say_alone(backbone_of, merged_laws, static, dtype):
    points = [{}, {"one": 1.0}, {"two": 0.3, "three": 0.9}, {"one": 0.1, "two": 0.2, "three": 0.3}]
    asked, wanted = requests(points=points), merged_laws(RESPONSE)
    decoder = GuidedDecoder(backbone_of(dtype=dtype, static=static))
    most, compared = 0.0, set()
    for trace in decoder.traces(asked, [RESPONSE] * len(asked)):
        for name in ("base", *trace.request.weights):
            law, other = trace.logps[name], wanted[name, trace.request.prompt]
            if dtype == torch.float32:
                torch.testing.assert_close(law, other, atol=1e-4, rtol=0)
            far = float((law - other).norm() / other.norm())
            most, compared = max(most, far), compared | {name}
    print(f"{dtype}: at most {most:.1e} from float32, by relative norm")
    assert most < (1e-5 if dtype == torch.float32 else 3e-2)
    assert compared == {"base", "one", "two", "three"}


@pytest.mark.parametrize("dtype", HALF)
def test_the_guided_law_in_half_precision_stays_close_to_float32(backbone_of, static, dtype):
    wanted = requests(max_new_tokens=16)
    precise = GuidedDecoder(backbone_of(static=static))
    texts = [row.tokens for row in run(precise, wanted)]
    half = GuidedDecoder(backbone_of(dtype=dtype, static=static))
    found = divergence(half.traces(wanted, texts), precise.traces(wanted, texts))
    print(f"{dtype}: mean KL of the guided law from float32's: {found:.5f} nats per token")
    assert 0 <= found < 0.05


def test_a_replayed_step_has_the_law_of_an_eager_one(backbone_of):
    wanted = requests(max_new_tokens=40, temperature=0.7)
    decoders = [GuidedDecoder(backbone_of(static=static)) for static in (False, True)]
    texts = [row.tokens for row in run(decoders[0], wanted)]
    eager, replayed = (decoder.traces(wanted, texts) for decoder in decoders)
    assert max(map(len, texts)) == 40
    for one, other in zip(eager, replayed, strict=True):
        for name, logps in one.logps.items():
            torch.testing.assert_close(logps, other.logps[name], atol=1e-4, rtol=0)


# Without a mask, as where all rows are of one length, and with one: some kernels take no mask, others no shared heads.
@pytest.mark.parametrize("prompts", [[PROMPTS[0]] * 3, PROMPTS], ids=["even", "ragged"])
@pytest.mark.parametrize("kernel", ["EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION", None])
@pytest.mark.parametrize("dtype", HALF)
def test_every_attention_kernel_has_the_law_of_the_plain_one(prompter, device, dtype, kernel, prompts):
    def decoder():
        size = prompter.vocab_size
        base, arm = (tiny_model(size, seed, width=256).eval().to(device, dtype) for seed in (5, 6))
        backbones = [Backbone(base, prompter), Backbone(arm, prompter, name="arm")]
        for one in backbones:
            one.static = False
        return GuidedDecoder(*backbones)

    greedy, drawn = (
        [Request(prompt, {"arm": 0.5}, temperature=temperature, max_new_tokens=12) for prompt in prompts]
        for temperature in (0.0, 1.0)
    )
    with sdpa_kernel(SDPBackend.MATH):
        plain = decoder()
        texts = [row.tokens for row in run(plain, greedy)]
        laws = plain.traces(drawn, texts)
    try:
        with nullcontext() if kernel is None else sdpa_kernel(getattr(SDPBackend, kernel)):
            other = decoder()
            run(other, greedy)
            found = divergence(other.traces(drawn, texts), laws)
    except RuntimeError as error:
        if not any(told in str(error) for told in ("No available kernel", "No viable backend", "execution plan")):
            raise
        pytest.skip(f"{kernel} does not take this: {str(error).splitlines()[0]}")
    print(f"{dtype}, {kernel}: mean KL of the guided law from that of plain attention: {found:.6f} nats per token")
    assert abs(found) < 0.05
