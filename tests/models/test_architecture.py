"""Models that can be trained but not decoded, or neither, are refused in one sentence and before any work."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig, CohereConfig, FalconConfig, MptConfig, OPTConfig

from pipeline.config.errors import UserError
from pipeline.config.schema import Arm, Model
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.fused_lora import read_adapter
from pipeline.models.fetch import HfApi, fetch
from pipeline.training.arm import trainable
from pipeline.training.reward_model import RewardModel
from tests.tiny import tiny_model

CPU = torch.device("cpu")
ALIBI = [
    BloomConfig(vocab_size=500, hidden_size=32, n_layer=2, n_head=4),
    MptConfig(vocab_size=500, d_model=32, n_heads=4, n_layers=2),
    FalconConfig(vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
]


@pytest.mark.parametrize("config", ALIBI, ids=lambda config: config.model_type)
def test_models_without_positions_are_refused_wherever_they_come(config, prompter, tmp_path):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="takes no positions"):
        trainable(model, Arm("tiny"), 0, CPU)
    with pytest.raises(UserError, match="takes no positions"):
        Backbone(model, prompter)
    (tmp_path / "models").mkdir()
    config.save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="takes no positions"):  # before it is seen that there are no weights
        fetch("it", Model(source="path", location=str(tmp_path / "source")), tmp_path / "models/it")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "vit"}, "vit is not a causal language model"),
        ({"model_type": "none of ours"}, r"config\.json cannot be read"),
        (ALIBI[0].to_dict(), "takes no positions"),
    ],
)
def test_an_architecture_is_refused_before_its_weights_are_downloaded(config, sentence, tmp_path, monkeypatch):
    downloaded = []

    def download(repository, revision, local_dir, allow_patterns):
        downloaded.append(allow_patterns)
        (local_dir / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr("pipeline.models.fetch.snapshot_download", download)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, revision: SimpleNamespace(sha=revision))
    with pytest.raises(UserError, match=sentence):
        fetch("it", Model(source="hub", location="org/name", revision="abc"), tmp_path / "it")
    assert downloaded == [["config.json"]]


def test_layers_whose_adapters_could_not_be_decoded_are_refused_before_training():
    config = OPTConfig(
        vocab_size=500, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=256,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"fc1 sees all rows of a batch as one.*leave it out of arm\.targets"):
        trainable(AutoModelForCausalLM.from_config(config).eval(), Arm("tiny", targets="all-linear"), 0, CPU)
    trainable(AutoModelForCausalLM.from_config(config).eval(), Arm("tiny", targets="q_proj,v_proj"), 0, CPU)


def test_a_reward_model_that_could_not_be_read_again_is_refused_before_training():
    config = CohereConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(UserError, match="no sequence classifier of the kind cohere"):
        RewardModel(AutoModelForCausalLM.from_config(config), torch.float32)


class Packed(torch.nn.Module):
    """A linear layer as GPTQ and AWQ keep it: numbers in buffers, and no parameters."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", layer.weight.data)


def test_an_adapter_of_packed_layers_is_read(tmp_path):
    model = tiny_model(500)
    get_peft_model(tiny_model(500), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    for layer in model.model.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
    assert len(read_adapter(tmp_path, model)) == 2
