import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    MistralConfig,
    Qwen2Config,
)

from pipeline.config.errors import UserError
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.decoder import GuidedDecoder, Request
from pipeline.decoding.kv_cache import BackboneSession
from pipeline.models.loading import load_model
from pipeline.models.prompting import Prompter
from tests.reference import CPU, PROMPTS, requests, run
from tests.tiny import tiny_model, tiny_tokenizer


def test_prefill_reads_a_prompt_once_per_lane_for_all_its_rows(decoder, monkeypatch):
    read, reading = [], BackboneSession._read
    monkeypatch.setattr(
        BackboneSession, "_read", lambda self, lanes, prompts: read.extend(lanes) or reading(self, lanes, prompts)
    )
    run(decoder, requests(prompts=PROMPTS[:2]))
    assert sorted(read) == sorted(["base", "one", "two", "three"] * 2)


def test_memory_does_not_grow_with_finished_rows(decoder, monkeypatch):
    sizes, merge = [], BackboneSession._merge

    def measured(lanes, *given):
        merge(lanes, *given)
        sizes.append(sum(layer.rooms[0].numel() for layer in lanes._cache.layers))

    monkeypatch.setattr(BackboneSession, "_merge", measured)
    run(decoder, [Request(PROMPTS[0], {"one": 1.0}, max_new_tokens=2 + n % 3, sample=n) for n in range(200)])
    assert len(sizes) > 30
    assert max(sizes[15:]) <= max(sizes[:15])


def test_every_model_is_asked_by_its_own_template(base, tiny, prompter):
    other = Prompter.load(tiny, "Q: {prompt} A:")
    guided = GuidedDecoder(Backbone(base, prompter), Backbone(base, other, name="arm"))
    request = Request(PROMPTS[0], {"arm": 1.0}, max_new_tokens=1, temperature=0)
    (row,) = run(guided, [request])
    logits = [base(torch.tensor([asked.prompt_ids(request.prompt)])).logits[0, -1] for asked in (prompter, other)]
    assert row.tokens == [int(sum(each.log_softmax(-1) for each in logits).argmax())]


SMALL = {
    "vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, sliding_window=8),
        Qwen2Config(**SMALL),
        Gemma2Config(**SMALL, head_dim=8, sliding_window=8),
        GPT2Config(vocab_size=500, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
        Gemma3Config(  # reads pictures as well
            text_config=SMALL | {"head_dim": 8, "sliding_window": 8},
            vision_config=VISION,
        ),
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
    half = GuidedDecoder(Backbone(load_model(tiny, dtype, CPU), prompter, arms))
    wanted = requests(max_new_tokens=1, temperature=0.0)
    for one, other in zip(run(half, wanted), run(decoder, wanted), strict=True):
        assert one.kl == pytest.approx(other.kl, abs=0.5) or one.tokens != other.tokens
    agreed = sum(one.tokens == other.tokens for one, other in zip(run(half, wanted), run(decoder, wanted), strict=True))
    assert agreed >= 0.8 * len(wanted)


def test_two_arms_of_one_name_are_refused(base, prompter, arms):
    with pytest.raises(UserError, match="two models are called one"):
        GuidedDecoder(Backbone(base, prompter, arms), Backbone(base, prompter, name="one"))
    with pytest.raises(UserError, match="two models are called base"):
        GuidedDecoder(Backbone(base, prompter), Backbone(base, prompter))
    with pytest.raises(UserError, match="has no lane base"):
        GuidedDecoder(Backbone(base, prompter, arms, name=None))


def test_an_arm_model_with_another_tokenizer_is_refused_by_name(base, prompter):
    foreign = Prompter(tiny_tokenizer(extra=["<other>"]), None)
    with pytest.raises(UserError, match=r"stranger: token 4 is '<other>', .*weighed against the model"):
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


def test_template_text_is_used_instead_of_the_chat_template(tiny):
    plain = Prompter.load(tiny, "USER: {prompt} ASSISTANT:")
    assert plain.tokenizer.decode(plain.prompt_ids("Why?")) == "USER: Why? ASSISTANT:"
    with pytest.raises(UserError, match=r"has no \{prompt\}"):
        Prompter.load(tiny, "USER: ASSISTANT:")
