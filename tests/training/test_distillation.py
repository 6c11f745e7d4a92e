import dataclasses
import json

import pytest
import torch

from pipeline.config.errors import UserError
from pipeline.config.schema import Distillation
from pipeline.models.fetch import shape
from pipeline.models.loading import model_digest
from pipeline.models.prompting import Prompter
from pipeline.models.vocabulary import check_vocabulary
from pipeline.stages import distil
from pipeline.training.batches import PromptGroup
from pipeline.training.distillation import Distiller, compare, pruned, train_child
from tests.tiny import tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(10, 30)[None]
CONFIG = Distillation((1,), "prompts.jsonl", samples_per_prompt=2, max_new_tokens=8, epochs=8, batch_size=2, lr=2e-2)


def distilled(params, config, *names):
    """The experiment with models that are distilled from its own."""
    spec = dataclasses.replace(params.models["tiny"], source="distilled", location="tiny", distillation=config)
    return dataclasses.replace(params, models={**params.models, **dict.fromkeys(names, spec)})


def at_hand(workspace, parent):
    workspace.models.mkdir(parents=True)
    workspace.model("tiny").symlink_to(parent)


def facts_of(params, workspace, name):
    distil.run(params, workspace, name)
    return json.loads((workspace.results / "models" / f"{name}.json").read_text())


@pytest.fixture
def parent():
    return tiny_model(500).eval().requires_grad_(False)


@pytest.fixture
def text(parent):
    torch.manual_seed(0)
    drawn = parent.generate(torch.arange(5, 9).repeat(32, 1), do_sample=True, max_new_tokens=12, min_new_tokens=12)
    rows = drawn[:, 4:].tolist()
    return [PromptGroup([5, 6, 7, 8], rows[at : at + 4], []) for at in range(0, 32, 4)]


def test_all_layers_are_the_parent_and_some_are_its_own(parent):
    whole = pruned(parent, [0, 1])
    torch.testing.assert_close(whole(IDS).logits, parent(IDS).logits)
    last = pruned(parent, [1])
    assert last.config.num_hidden_layers == 1
    for name, weight in last.state_dict().items():
        assert torch.equal(weight, parent.state_dict()[name.replace("layers.0.", "layers.1.")])


@pytest.mark.parametrize("layers", [[], [2], [1, 0], [0, 0], [-1, 0]])
def test_layers_that_are_not_the_parents_are_refused(parent, layers):
    with pytest.raises(UserError, match=r"distillation\.layers .*: name layers from 0 to 1, ascending, each once\."):
        pruned(parent, layers)


def test_distillation_brings_the_child_to_the_parents_law_and_leaves_the_vocabulary(parent, text, tmp_path):
    train, held_out = text[:6], text[6:]
    before = compare(parent, pruned(parent, CONFIG.layers), held_out, 2, 0)
    child, history = train_child(parent, train, held_out, CONFIG, torch.float32, 0, tmp_path)
    after = compare(parent, child, held_out, 2, 0)
    assert after["kl"] < 0.7 * before["kl"]
    assert before["parent_perplexity"] == after["parent_perplexity"] < after["perplexity"] < before["perplexity"]
    assert torch.equal(child.get_input_embeddings().weight, parent.get_input_embeddings().weight)
    assert [row["step"] for row in history if row["phase"] == "eval"][-1] == 24
    assert sum(row["phase"] == "train" for row in history) == 24


def test_a_killed_distillation_goes_on_where_it_stopped(parent, text, tmp_path, monkeypatch):
    wanted, _ = train_child(parent, text[:6], text[6:], CONFIG, torch.float32, 0, tmp_path / "whole")
    step = Distiller.training_step

    def dying(self, batch, batch_idx):
        if self.global_step == 7:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Distiller, "training_step", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train_child(parent, text[:6], text[6:], CONFIG, torch.float32, 0, tmp_path / "killed")
    monkeypatch.undo()
    found, history = train_child(parent, text[:6], text[6:], CONFIG, torch.float32, 0, tmp_path / "killed")
    assert [row["step"] for row in history if row["phase"] == "train"] == list(range(24))
    for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loss_that_is_not_finite_stops_it(parent, text, tmp_path):
    with pytest.raises(UserError, match=r"distillation: the loss is nan at step \d+: lower distillation\.lr\."):
        train_child(parent, text[:6], text[6:], dataclasses.replace(CONFIG, lr=1e30), torch.float32, 0, tmp_path)


def test_a_distilled_model_has_its_parents_vocabulary_and_its_measures(tiny, smoke_params, workspace, tmp_path, capsys):
    prompts = [
        f'{{"prompt": "What is {n}?", "split": "{s}"}}' for n, s in enumerate(["train"] * 4 + ["validation"] * 2)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    config = dataclasses.replace(CONFIG, prompts=str(tmp_path / "prompts.jsonl"))
    params = distilled(smoke_params, config, "one", "two")
    at_hand(workspace, tiny)
    measured = facts_of(params, workspace, "one")
    assert min(measured["perplexity"], measured["parent_perplexity"]) > 1 and measured["kl"] > 0
    assert shape(workspace.model("one"))["layers"] == 1
    prompters = [Prompter.load(folder, None) for folder in (tiny, workspace.model("one"))]
    check_vocabulary(*(prompter.tokenizer for prompter in prompters), "one")
    assert (workspace.model("one") / "curve.csv").read_text().startswith("step,phase,kl")
    assert model_digest(workspace.model("one")) != model_digest(tiny)
    capsys.readouterr()
    distil.run(params, workspace, "two")
    assert "distil: 8 of 8 rows are in the store already" in capsys.readouterr().out, (
        "models of one parent share the text"
    )


def test_a_prompt_that_leaves_no_room_is_left_out_and_counted(tiny, smoke_params, workspace, tmp_path, capsys):
    words = ["tea", "rain", "word " * 400]  # the last exceeds the tiny model's context of 256 tokens
    rows = [
        {"prompt": f"Why {word} ({split})?", "split": split} for split in ("train", "validation") for word in words
    ]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = dataclasses.replace(CONFIG, prompts=str(tmp_path / "prompts.jsonl"), epochs=1)
    params = distilled(smoke_params, config, "one")
    at_hand(workspace, tiny)
    measured = facts_of(params, workspace, "one")
    assert measured["prompts_left_out"] == 2
    assert "1 of 3 prompts of split train left out: with 8 new tokens they exceed" in capsys.readouterr().out
    (tmp_path / "prompts.jsonl").write_text(json.dumps(rows[2]))
    with pytest.raises(UserError, match=r"no prompt of split train leaves room for 8 tokens in the context of 256: "):
        distil.run(params, workspace, "one")


def test_distillation_without_prompts_to_learn_from_is_refused(tiny, smoke_params, workspace, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?", "split": "test"}\n')
    params = distilled(smoke_params, dataclasses.replace(CONFIG, prompts=str(tmp_path / "prompts.jsonl")), "one")
    at_hand(workspace, tiny)
    with pytest.raises(UserError, match="no prompt of split train to distil one with"):
        distil.run(params, workspace, "one")
    with pytest.raises(UserError, match=r"models\.tiny is not distilled: set its source to distilled"):
        distil.run(params, workspace, "tiny")
