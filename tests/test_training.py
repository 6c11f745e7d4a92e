import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pipeline import arm as arm_module
from pipeline import models, training
from pipeline.arm import ARM, attach_adapter, pair_logps
from pipeline.config import Trainer, UserError
from pipeline.losses import arm_loss
from pipeline.pairs import PromptGroup, collate, tokenise
from tests.tiny import tiny_model

CPU = torch.device("cpu")
CONFIG = Trainer(batch_size=2, checkpoint_every=2, evaluations_per_epoch=1, epochs=2, lr=5e-3, warmup_steps=1)


@pytest.fixture
def groups(prompter):
    prompts = ["Describe a rainy Monday.", "Tips?", "Why?", "What is tea?", "Tell me a joke.", "How was it?", "And?"]
    rows = [
        {"id": f"{p}{n}", "prompt": prompt, "chosen": f"{'good great ' * (n + 1)}love", "rejected": bad}
        for p, prompt in enumerate(prompts)
        for n, bad in enumerate(("bad awful", "sad"))
    ]
    return tokenise(rows, prompter, 256, "rows")


def new_module(tiny, smoke_params, dropout=0.1, config=CONFIG, beta=0.1):
    arm = dataclasses.replace(smoke_params.arm, dropout=dropout)
    return ARM(attach_adapter(models.load_model(tiny, torch.float32, CPU), arm, 0), beta, config, 4 * config.epochs, 0)


def fit(module, groups, folder, config=CONFIG):
    loaders = training.train_loader(groups, config.batch_size, 0, 0), training.eval_loader(groups[:2], 2, 0)
    return training.fit(module, *loaders, config, folder, False)


def adapter(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def two_row_logps(model, group, dtype=torch.float64):
    """Each response in a row of its own behind its own copy of the prompt."""
    found = []
    for response in group.responses:
        ids = torch.tensor([group.prompt + response])
        logps = torch.log_softmax(model(ids).logits[0].to(dtype), -1)
        start = len(group.prompt) - 1
        found.append(sum(logps[start + at, token] for at, token in enumerate(response)))
    return torch.stack([found[good] for good, _ in group.pairs]), torch.stack([found[bad] for _, bad in group.pairs])


def test_shared_prompt_rows_equal_separate_rows_in_value_and_gradient(groups):
    model = tiny_model(500).double().eval()
    batch = collate(groups[:3], pad=0)
    gradients = []
    for chosen, rejected in (
        pair_logps(model, batch),
        tuple(torch.cat(parts) for parts in zip(*(two_row_logps(model, group) for group in groups[:3]), strict=True)),
    ):
        model.zero_grad()
        arm_loss(chosen, rejected, 0.1).mean().backward()
        gradients.append((chosen.detach(), rejected.detach(), [p.grad.clone() for p in model.parameters()]))
    for shared, separate in zip(gradients[0][:2], gradients[1][:2], strict=True):
        torch.testing.assert_close(shared, separate, atol=1e-8, rtol=1e-8)
    for shared, separate in zip(gradients[0][2], gradients[1][2], strict=True):
        torch.testing.assert_close(shared, separate, atol=1e-5, rtol=1e-5)


def test_prompt_and_sibling_tokens_never_enter_the_log_probability(groups):
    model = tiny_model(500).double().eval()
    group = groups[0]
    alone = PromptGroup(group.prompt, [group.responses[place] for place in group.pairs[0]], [(0, 1)])
    torch.testing.assert_close(
        pair_logps(model, collate([group], 0))[0][:1], pair_logps(model, collate([alone], 0))[0], atol=1e-9, rtol=1e-9
    )
    assert all(response[-1] == 1 for response in group.responses), "the end-of-sequence token is part of a response"


def test_loss_is_the_equation():
    chosen, rejected = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -2.0])
    wanted = [-torch.log(torch.sigmoid(torch.tensor(0.1 * 2.0))), -torch.log(torch.sigmoid(torch.tensor(0.1 * -7.0)))]
    torch.testing.assert_close(arm_loss(chosen, rejected, 0.1), torch.stack(wanted))


def test_training_learns_and_keeps_the_best_step(tiny, smoke_params, groups, tmp_path):
    module = new_module(
        tiny, smoke_params, dropout=0.0, config=dataclasses.replace(CONFIG, epochs=6, lr=2e-2), beta=1.0
    )
    loader = training.eval_loader(groups, 2, 0)
    before = training.held_out_accuracy(module, loader, CPU, 0.95)
    fit(module, groups, tmp_path, dataclasses.replace(CONFIG, epochs=6, lr=2e-2))
    after = training.held_out_accuracy(module, loader, CPU, 0.95)
    assert after.accuracy > max(before.accuracy, 0.8)
    losses = [row["loss"] for row in module.history if row["phase"] == "eval"]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_dropout_is_on_while_training(tiny, smoke_params, groups, tmp_path, monkeypatch):
    module, modes = new_module(tiny, smoke_params), []
    step = ARM.training_step

    def watching(self, batch, index):
        modes.extend(m.training for m in self.model.modules() if isinstance(m, torch.nn.Dropout))
        return step(self, batch, index)

    monkeypatch.setattr(ARM, "training_step", watching)
    fit(module, groups, tmp_path)
    assert modes and all(modes)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_interrupted_and_resumed_equals_uninterrupted(tiny, smoke_params, groups, tmp_path, monkeypatch, stop):
    whole = new_module(tiny, smoke_params)
    fit(whole, groups, tmp_path / "whole")
    config = dataclasses.replace(CONFIG, checkpoint_every=1)
    step = ARM.training_step

    def dying(self, batch, index):
        if self.global_step == stop:
            raise ConnectionError("killed")
        return step(self, batch, index)

    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr(ARM, "training_step", dying)
        fit(new_module(tiny, smoke_params, config=config), groups, tmp_path / "cut", config)
    assert training.newest_checkpoint(tmp_path / "cut").name == f"step={stop:06d}.ckpt"
    resumed = new_module(tiny, smoke_params, config=config)
    fit(resumed, groups, tmp_path / "cut", config)
    assert [row for row in resumed.history if row["phase"] == "train"] == [
        row for row in whole.history if row["phase"] == "train"
    ]
    for name, weight in adapter(whole).items():
        torch.testing.assert_close(adapter(resumed)[name], weight, atol=0, rtol=0)


def test_checkpoints_hold_the_adapter_only_and_a_torn_one_is_passed_over(tiny, smoke_params, groups, tmp_path):
    module = new_module(tiny, smoke_params)
    fit(module, groups, tmp_path)
    files = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(files) == 2
    state = torch.load(files[-1], weights_only=True)["state_dict"]
    assert state.keys() == adapter(module).keys()
    files[-1].write_bytes(files[-1].read_bytes()[:1000])
    with pytest.warns(UserWarning, match="going back"):
        assert training.newest_checkpoint(tmp_path) == files[0]


def test_a_nan_loss_stops_and_keeps_the_last_good_checkpoint(tiny, smoke_params, groups, tmp_path, monkeypatch):
    losses = iter([1.0, 1.0, 1.0, float("nan")])
    honest = arm_module.arm_loss
    monkeypatch.setattr(arm_module, "arm_loss", lambda *args: honest(*args) * next(losses))
    with pytest.raises(UserError, match="the training loss is nan at step 3: training stopped"):
        fit(new_module(tiny, smoke_params), groups, tmp_path)
    newest = training.newest_checkpoint(tmp_path)
    state = torch.load(newest, weights_only=True)["state_dict"]
    assert newest.name == "step=000002.ckpt" and all(torch.isfinite(weight).all() for weight in state.values())


def test_a_nan_gradient_stops_before_the_step(tiny, smoke_params, groups, tmp_path, monkeypatch):
    module = new_module(tiny, smoke_params)
    before = adapter(module)

    def spoil(self):
        next(p for p in self.parameters() if p.grad is not None).grad[0] = float("nan")

    monkeypatch.setattr(ARM, "on_after_backward", spoil)
    with pytest.raises(UserError, match="a gradient is not finite at step 0"):
        fit(module, groups, tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter(module).items())


def test_adapter_folder_is_plain_peft_with_a_card(tiny, smoke_params, groups, prompter, tmp_path):
    module = new_module(tiny, smoke_params)
    fit(module, groups, tmp_path / "run")
    card = training.model_card(smoke_params, "positivity", {"held-out pair accuracy": "0.7"})
    training.save_adapter(module.model, prompter.tokenizer, tmp_path / "arm", "tiny", card)
    text = (tmp_path / "arm" / "README.md").read_text(encoding="utf-8")
    assert all(part in text for part in ("library_name: peft", "β_r", "held-out pair accuracy | 0.7", "license:"))
    assert json.loads((tmp_path / "arm" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert all(
        torch.isfinite(weight).all() for weight in load_file(tmp_path / "arm/adapter_model.safetensors").values()
    )
    again = PeftModel.from_pretrained(models.load_model(tiny, torch.float32, CPU), str(tmp_path / "arm")).eval()
    module.eval()
    batch = collate(groups[:2], 0)
    with torch.no_grad():
        for mine, theirs in zip(pair_logps(module.model, batch), pair_logps(again, batch), strict=True):
            torch.testing.assert_close(mine, theirs)
