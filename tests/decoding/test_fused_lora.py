import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pipeline.config.errors import UserError
from pipeline.config.points import BASE
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.fused_lora import AdaptedModel, read_adapter
from pipeline.models.loading import load_model
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def adapted(base, arms):
    return AdaptedModel(base, {name: read_adapter(folder, base) for name, folder in arms.items()})


@torch.no_grad()
def peft_logits(tiny, folder, ids):
    return PeftModel.from_pretrained(load_model(tiny, torch.float32, CPU), str(folder)).eval()(ids).logits


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 1, 0, 2), (0, 2, 2, 2), (2, 0, 0, 1), (4, 0, 0, 0)])
@torch.no_grad()
def test_each_block_is_peft_s_forward_of_its_own_adapter(tiny, base, arms, counts):
    ids = torch.randint(0, 500, (sum(counts), 7), generator=torch.Generator().manual_seed(0))
    blocks, start = [], 0
    for lane, count in zip((BASE, *arms), counts, strict=True):
        blocks.append((lane, start, start + count))
        start += count
    plain = base(ids).logits
    model = adapted(base, arms)
    model.serve(blocks, step=False)
    found = model.model(ids).logits
    for lane, first, last in (block for block in blocks if block[2] > block[1]):
        wanted = plain[first:last] if lane == BASE else peft_logits(tiny, arms[lane], ids[first:last])
        torch.testing.assert_close(found[first:last], wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_model_given_keeps_its_behaviour_and_shares_its_weights(tiny, base, arms):
    ids = torch.randint(0, 500, (2, 5), generator=torch.Generator().manual_seed(1))
    before, names = base(ids).logits, set(base.state_dict())
    first, second = adapted(base, arms), adapted(base, arms)
    for model in (first, second):
        model.serve([("one", 0, 2)], step=False)
        assert not torch.allclose(model.model(ids).logits, before, atol=1e-3)
        assert {p.data_ptr() for p in model.model.parameters()} == {p.data_ptr() for p in base.parameters()}
    torch.testing.assert_close(base(ids).logits, before, atol=1e-6, rtol=0)
    assert set(base.state_dict()) == names
    groups = [group._weight_OD.untyped_storage().data_ptr() for group in first._groups if group._weight_OD is not None]
    assert groups == [
        group._weight_OD.untyped_storage().data_ptr() for group in second._groups if group._weight_OD is not None
    ]


def test_layers_fed_the_same_tensor_become_one_product(base, arms):
    sizes = sorted(len(group._sizes) for group in adapted(base, arms)._groups)
    assert sizes == [1, 1, 1, 1, 2, 2, 3, 3]  # o and down, gate and up, q, k and v, of two layers


@torch.no_grad()
def test_biases_of_joined_layers_are_kept(arms):
    torch.manual_seed(0)
    model = tiny_model(500)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.randn(layer.self_attn.k_proj.out_features))
    ids = torch.randint(0, 500, (2, 5))
    plain = model.eval()(ids).logits
    twin = adapted(model, {})
    torch.testing.assert_close(twin.model(ids).logits, plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rank_stabilised_scaling_is_peft_s(tiny, base, tmp_path):
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["o_proj"], task_type="CAUSAL_LM")
    made = get_peft_model(load_model(tiny, torch.float32, CPU), config)
    for key, weight in made.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.2)
    made.save_pretrained(str(tmp_path))
    ids = torch.randint(0, 500, (1, 5))
    model = adapted(base, {"one": tmp_path})
    model.serve([("one", 0, 1)], step=False)
    torch.testing.assert_close(model.model(ids).logits, peft_logits(tiny, tmp_path, ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_bias_of_an_adapter_is_its_own_rows_alone_as_in_peft(tiny, base, arms, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, lora_bias=True, target_modules="all-linear", task_type="CAUSAL_LM")
    made = get_peft_model(load_model(tiny, torch.float32, CPU), config)
    generator = torch.Generator().manual_seed(6)
    for key, weight in made.named_parameters():
        if "lora_B" in key:
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    made.save_pretrained(str(tmp_path))
    ids = torch.randint(0, 500, (5, 6), generator=generator)
    wanted, other = peft_logits(tiny, tmp_path, ids), peft_logits(tiny, arms["one"], ids)
    plain = base(ids).logits
    assert not torch.allclose(wanted, plain, atol=0.1)
    model = adapted(base, {"one": arms["one"], "biased": tmp_path})
    for step in (False, True):
        model.serve([(BASE, 0, 1), ("one", 1, 3), ("biased", 3, 5)], step=step)
        found = model.model(ids).logits
        for rows, expected in ((slice(0, 1), plain), (slice(1, 3), other), (slice(3, 5), wanted)):
            torch.testing.assert_close(found[rows], expected[rows], atol=1e-4, rtol=1e-4)
    model.serve_slots(torch.tensor([[0.0, 1], [0, 0], [1, 0], [0, 1], [1, 0]]))
    found = model.model(ids).logits
    for rows, expected in (([0, 3], wanted), ([1], plain), ([2, 4], other)):
        torch.testing.assert_close(found[rows], expected[rows], atol=1e-4, rtol=1e-4)


def copied(folder, arm):
    folder.mkdir()
    for file in arm.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_missing_damaged_or_foreign_adapter_is_one_sentence(base, arms, tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        read_adapter(tmp_path / "gone", base)
    broken = copied(tmp_path / "broken", arms["one"])
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError, match="could not be read"):
        read_adapter(broken, base)
    wide = tiny_model(500)
    wide.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(UserError, match="does not fit the base"):
        read_adapter(arms["one"], wide)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, "no plain LoRA"),
        ({"alpha_pattern": {"q_proj": 3}}, "no plain LoRA"),
        ({"trainable_token_indices": [1]}, "no plain LoRA"),
        ({"init_lora_weights": "pissa"}, r"changes its base \(pissa\)"),
    ],
)
def test_what_would_be_applied_wrongly_is_refused(base, arms, tmp_path, change, sentence):
    odd = copied(tmp_path / "odd", arms["one"])
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=sentence):
        read_adapter(odd, base)


@pytest.mark.parametrize(
    "key",
    [
        "model.embed_tokens.lora_embedding_A",
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.lora_B.bias",
    ],
)
def test_weights_that_are_no_low_rank_update_are_refused(base, arms, tmp_path, key):
    odd = copied(tmp_path / "odd", arms["one"])
    tensors = load_file(odd / "adapter_model.safetensors")
    save_file(tensors | {f"base_model.model.{key}": torch.zeros(4, 500)}, odd / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no plain LoRA weight"):
        read_adapter(odd, base)


@pytest.mark.parametrize("name", ["base", "small"])
def test_an_adapter_cannot_be_called_like_its_model(base, prompter, arms, name):
    with pytest.raises(UserError, match=f"an ARM cannot be called {name}"):
        Backbone(base, prompter, {name: arms["one"]}, name="small")


def test_an_adapter_that_is_not_finite_is_refused_by_its_layer(base, arms, tmp_path):
    spoiled = copied(tmp_path / "spoiled", arms["one"])
    tensors = load_file(spoiled / "adapter_model.safetensors")
    name = next(key for key in tensors if "layers.1.mlp.up_proj.lora_B" in key)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, spoiled / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"update of model\.layers\.1\.mlp\.up_proj is not finite"):
        read_adapter(spoiled, base)


def test_an_adapter_with_another_tokenizer_is_refused_by_its_first_differing_token(base, arms, prompter, tmp_path):
    foreign = copied(tmp_path / "foreign", arms["one"])
    tiny_tokenizer(extra=["<other>"]).save_pretrained(foreign)
    with pytest.raises(UserError, match="foreign: token 4 is '<other>'"):
        Backbone(base, prompter, {"foreign": foreign})
