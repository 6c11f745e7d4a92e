"""Reward models of one's own as judges."""

import dataclasses

import pytest
import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForSequenceClassification

from pipeline.config.errors import UserError
from pipeline.config.judges import RewardJudge, Scoring
from pipeline.data.responses import Response
from pipeline.evaluation import judging
from pipeline.evaluation.judges import reward_model
from pipeline.evaluation.statistics import Bootstrap
from pipeline.models.control_tokens import ControlTokens
from pipeline.stages import judge as stage
from tests.evaluation.conftest import rows_of
from tests.judges import generated, judge_of, rewards_of
from tests.tiny import tiny_tokenizer

TEMPLATE = "USER: {prompt} ASSISTANT:{response}"
DIALOGUE = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: How?\n\nAssistant:"


@pytest.fixture
def classifier(tmp_path):
    """A reward model of 64 positions, and its folder."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return model, tmp_path / "reward"


def judged_by(smoke_params, folder, **settings):
    spec = Scoring("path", str(folder), **{"template": TEMPLATE, "dtype": "float32", **settings})
    return dataclasses.replace(
        smoke_params, judge=RewardJudge(kind="reward_model", models=dict.fromkeys(smoke_params.objectives, spec))
    )


@pytest.fixture
def loads(monkeypatch):
    """The reward models that are loaded, by their folders."""
    seen, load = [], reward_model._load

    def counted(spec, *rest):
        seen.append(spec.location)
        return load(spec, *rest)

    monkeypatch.setattr(reward_model, "_load", counted)
    return seen


def test_a_text_beyond_the_context_loses_its_beginning_and_is_counted(classifier, smoke_params, workspace, capsys):
    model, folder = classifier
    params = judged_by(smoke_params, folder)
    rows = [generated("Why? " * 200, "good"), generated("Why?", "good")]
    long, _ = judging.judge_rows(rows, judge_of(params, workspace), {})
    assert "judge: positivity: 1 of 2 texts exceed the reward model's context" in capsys.readouterr().out
    tokenizer = tiny_tokenizer()
    text = TEMPLATE.replace("{prompt}", rows[0].prompt).replace("{response}", "good")
    ids = tokenizer(text).input_ids
    assert len(ids) > 64
    with torch.no_grad():
        assert long.scores["positivity"] == pytest.approx(float(model(torch.tensor([ids[-64:]])).logits), abs=1e-4)
    long_pair = {"prompt": "Why? " * 200, "chosen": "good", "rejected": "bad"}
    labelled = {"positivity": [long_pair, {"prompt": "Why?", "chosen": "a", "rejected": "b"}]}
    card = judging.judge_card(labelled, judge_of(params, workspace), params.judge.kind, Bootstrap.of(params.judge, 0))
    assert card["objectives"]["positivity"]["truncated"] == 0.5
    assert "0.500 of the texts truncated" in judging.card_lines(card)[0]


def test_what_begins_a_text_stays_where_it_is_cut():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", 2)]
    )
    control = ControlTokens.of(tokenizer, TEMPLATE)
    assert reward_model._within([2, 5, 6, 7, 8], 3, control) == [2, 7, 8]
    assert reward_model._within([2, 5, 6], 3, control) == [2, 5, 6]
    assert reward_model._within([4, 5, 6, 7], 3, control) == [5, 6, 7]


def test_each_model_is_loaded_once_a_run(classifier, smoke_params, workspace, loads, tmp_path):
    _, folder = classifier
    other = tmp_path / "other"
    other.symlink_to(folder)
    spec = Scoring("path", str(folder), template=TEMPLATE, dtype="float32")
    models = {"positivity": spec, "conciseness": dataclasses.replace(spec, location=str(other))}
    params = dataclasses.replace(smoke_params, judge=RewardJudge(kind="reward_model", models=models, batch_size=2))
    rows_of(workspace)
    stage.run(params, workspace)
    assert sorted(loads) == sorted([str(folder), str(other)]), "once each, for the card and the rows"
    stage.run(params, workspace)
    assert len(loads) == 2, "what is scored is kept"


def test_what_is_scored_before_a_failure_is_kept(classifier, smoke_params, workspace, monkeypatch):
    params = judged_by(smoke_params, classifier[1])
    judge = dataclasses.replace(params.judge, batch_size=2)
    rows = [Response(prompt="Why?", response=f"word {number}") for number in range(10)]
    seen, rewards = [], reward_model._rewards

    def failing(model, tokenizer, ids):
        seen.append(len(ids))
        if len(seen) == 4:
            raise MemoryError
        return rewards(model, tokenizer, ids)

    monkeypatch.setattr(reward_model, "_rewards", failing)
    with pytest.raises(MemoryError):
        rewards_of(judge, params, workspace).of({"positivity": rows})
    rewards_of(judge, params, workspace).of({"positivity": rows})
    assert sum(seen[4:]) == 4, "six were kept"


def test_a_dialogue_is_given_as_turns_or_refused():
    tokenizer, row = tiny_tokenizer(), Response(prompt=DIALOGUE, response="Slowly.")
    ids = reward_model._ids(Scoring("path", "x"), tokenizer, ControlTokens.of(tokenizer, None), row)
    assert tokenizer.decode(ids) == "<user>Why?<end><user>So.<end><user>How?<end><user>Slowly.<end>"
    with pytest.raises(UserError, match="has room for one turn, and a prompt is a dialogue"):
        reward_model._ids(
            Scoring("path", "x", template=TEMPLATE), tokenizer, ControlTokens.of(tokenizer, TEMPLATE), row
        )
    plain = "{prompt} {response}"
    ids = reward_model._ids(Scoring("path", "x", template=plain), tokenizer, ControlTokens.of(tokenizer, plain), row)
    assert tokenizer.decode(ids) == f"{DIALOGUE} Slowly."


def test_a_text_is_begun_and_ended_once():
    tokenizer, row = tiny_tokenizer(), Response(prompt="Why?", response="Slowly.")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A <end>", special_tokens=[("<user>", 2), ("<end>", 1)]
    )
    for template in ("<user>{prompt} {response}", "{prompt} {response}<end>", "{prompt} {response}"):
        ids = reward_model._ids(
            Scoring("path", "x", template=template), tokenizer, ControlTokens.of(tokenizer, template), row
        )
        assert (ids.count(2), ids[0], ids.count(1), ids[-1]) == (1, 2, 1, 1)


def test_folders_are_checked_when_the_judge_is_opened(classifier, smoke_params, workspace, tmp_path):
    """Whichever stage opens it: before anything is generated for it."""
    rows_of(workspace)
    with pytest.raises(UserError, match=r"judge\.models\.positivity: there is no folder .*nowhere"):
        stage.run(judged_by(smoke_params, tmp_path / "nowhere"), workspace)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"holds no model \(no config\.json\)"):
        judge_of(judged_by(smoke_params, empty), workspace)
    (empty / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gone"}')
    (empty / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors: convert"):
        judge_of(judged_by(smoke_params, empty), workspace)
    (empty / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is an adapter of gone, which is not among the models at hand"):
        judge_of(judged_by(smoke_params, empty), workspace)
