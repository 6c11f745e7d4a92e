import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from pipeline import models
from pipeline.config import UserError
from pipeline.decoder import GuidedDecoder, Request
from pipeline.guidance import random_stream
from pipeline.lanes import BASE, Lanes
from pipeline.models import Prompter
from pipeline.store import digest
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["Describe a rainy Monday.", "Tips?", "Write a review of the corner bakery near the station.", "Why?"]
POINTS = [{}, {"one": 1.0}, {"one": 0.5, "two": 0.5}, {"two": 0.3, "three": 0.9}]


def requests(prompts=PROMPTS, points=POINTS, length=6, temperature=1.0):
    return [
        Request(prompt, digest([prompt, place]), length, point, temperature)
        for prompt in prompts
        for place, point in enumerate(points)
    ]


def run(base, prompter, arms, wanted, batch_size=8):
    decoder = GuidedDecoder(base, prompter, arms, batch_size=batch_size)
    rows = dict(decoder.generate(wanted))
    return [rows[index] for index in range(len(wanted))]


def reference(tiny, arms, prompter, request):
    """The decoding rule once more: float64, one row, PEFT's own forward, no cache, numpy arithmetic."""
    base = models.load_model(tiny, torch.float64, torch.device("cpu"))
    experts = [(1.0, base)]
    for name, alpha in request.weights.items():
        fresh = models.load_model(tiny, torch.float64, torch.device("cpu"))
        experts.append((alpha, PeftModel.from_pretrained(fresh, str(arms[name])).double().eval()))
    prompt, tokens = prompter.prompt_ids(request.prompt), []
    uniforms, sums = random_stream(request.stream, request.max_new_tokens), np.zeros(3)

    def log_softmax(values):
        values = values - values.max()
        return values - np.log(np.exp(values).sum())

    with torch.no_grad():
        for uniform in uniforms:
            ids = torch.tensor([prompt + tokens])
            each = [log_softmax(model(ids).logits[0, -1, : prompter.vocab_size].numpy()) for _, model in experts]
            law = log_softmax(sum(a * logps for (a, _), logps in zip(experts, each, strict=True)) / request.temperature)
            token = int(np.searchsorted(np.cumsum(np.exp(law)), uniform, side="right"))
            tokens.append(token)
            sums += [law[token], each[0][token], (np.exp(law) * (law - each[0])).sum()]
            if token == prompter.eos:
                break
    return tokens, sums


def test_decoder_equals_an_independent_float64_loop(tiny, base, arms, prompter):
    wanted = requests(temperature=0.7)
    for request, row in zip(wanted, run(base, prompter, arms, wanted), strict=True):
        tokens, sums = reference(tiny, arms, prompter, request)
        assert row.tokens == tokens
        np.testing.assert_allclose([row.logp, row.logp_base, row.kl], sums, atol=1e-4 * len(tokens))


def test_batch_order_and_neighbours_change_nothing(base, arms, prompter):
    wanted = requests()
    together = run(base, prompter, arms, wanted, batch_size=16)
    assert [row.tokens for row in run(base, prompter, arms, wanted, batch_size=1)] == [row.tokens for row in together]
    backwards = run(base, prompter, arms, wanted[::-1], batch_size=5)[::-1]
    assert [row.tokens for row in backwards] == [row.tokens for row in together]


def test_an_arm_at_zero_leaves_outputs_identical(base, tiny, arms, prompter):
    two = {name: arms[name] for name in ("one", "two")}
    plain = run(base, prompter, two, requests(points=[{"one": 0.5, "two": 0.5}]))
    fresh = models.load_model(tiny, torch.float32, torch.device("cpu"))
    with_third = run(fresh, prompter, arms, requests(points=[{"one": 0.5, "two": 0.5, "three": 0.0}]))
    assert plain == with_third


def test_no_weights_is_the_base_and_has_no_divergence(base, arms, prompter):
    for row in run(base, prompter, arms, requests(points=[{}])):
        assert row.kl == pytest.approx(0, abs=1e-4)
        assert row.logp == pytest.approx(row.logp_base, abs=1e-4)


def test_rows_end_at_eos_or_at_their_own_limit(base, prompter):
    wanted = [Request(PROMPTS[0], digest(["end", i]), 4 + i % 9) for i in range(60)]
    for request, row in zip(wanted, run(base, prompter, {}, wanted, batch_size=7), strict=True):
        if row.finish == "eos":
            assert row.tokens[-1] == prompter.eos and prompter.eos not in row.tokens[:-1]
        else:
            assert len(row.tokens) == request.max_new_tokens and prompter.eos not in row.tokens


def test_adapter_block_equals_peft_forward(tiny, base, arms, prompter):
    ids = torch.tensor([prompter.prompt_ids(PROMPTS[0])])
    lanes = Lanes(base, arms)
    row = torch.zeros(1, dtype=torch.long)
    lanes.prefill(ids, torch.ones_like(ids), row, dict.fromkeys((BASE, *arms), row))
    for name, folder in arms.items():
        fresh = models.load_model(tiny, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            wanted = PeftModel.from_pretrained(fresh, str(folder)).eval()(ids).logits[:, -1]
        torch.testing.assert_close(lanes.logits(name), wanted, atol=1e-5, rtol=1e-5)


def test_unknown_arm_and_long_prompt_are_refused_before_anything_runs(base, arms, prompter):
    decoder = GuidedDecoder(base, prompter, {"one": arms["one"]})
    with pytest.raises(UserError, match="weights name two, but the ARMs are one"):
        list(decoder.generate(requests(points=[{"two": 1.0}])))
    with pytest.raises(UserError, match="context of 256"):
        list(decoder.generate([Request("word " * 300, digest("x"), 8)]))


def test_missing_damaged_or_foreign_adapter_is_one_sentence(base, arms, prompter, tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        GuidedDecoder(base, prompter, {"gone": tmp_path / "gone"})
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (broken / name).write_bytes((arms["one"] / name).read_bytes()[:200])
    with pytest.raises(UserError, match="could not be read"):
        GuidedDecoder(base, prompter, {"broken": broken})
    wide = tiny_model(500)
    wide.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(UserError, match="does not fit the base"):
        GuidedDecoder(wide, prompter, {"one": arms["one"]})


def test_arm_with_another_tokenizer_is_refused_by_its_first_differing_token(base, arms, prompter, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for file in arms["one"].iterdir():
        (foreign / file.name).write_bytes(file.read_bytes())
    tiny_tokenizer(extra=["<other>"]).save_pretrained(foreign)
    with pytest.raises(UserError, match="foreign: token 4 is '<other>'"):
        GuidedDecoder(base, prompter, {"foreign": foreign})


def test_an_extra_pad_token_and_a_padded_embedding_are_welcome(tiny, prompter):
    grown = AutoTokenizer.from_pretrained(tiny)
    grown.add_special_tokens({"pad_token": "<extra-pad>"})
    models.check_vocabulary(prompter.tokenizer, grown, "grown")
    padded = tiny_model(prompter.vocab_size + 61).eval()
    rows = dict(GuidedDecoder(padded, prompter, {}).generate(requests(points=[{}])))
    assert all(token < prompter.vocab_size for row in rows.values() for token in row.tokens)


def test_template_text_is_used_instead_of_the_chat_template(tiny):
    plain = Prompter.load(tiny, "USER: {prompt} ASSISTANT:")
    assert plain.tokenizer.decode(plain.prompt_ids("Why?")) == "USER: Why? ASSISTANT:"
    with pytest.raises(UserError, match=r"has no \{prompt\}"):
        Prompter.load(tiny, "USER: ASSISTANT:")
