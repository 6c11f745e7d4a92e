import dataclasses
import warnings

import pytest
import torch

from pipeline.config.errors import UserError
from pipeline.config.schema import Loss, Trainer
from pipeline.evaluation.statistics import Bootstrap
from pipeline.models.loading import load_model
from pipeline.stages.train import arm_job
from pipeline.training import arm as arm_module
from pipeline.training.arm import ARM, ResponseModel, trainable
from pipeline.training.batches import collate, tokenise
from pipeline.training.checkpoints import load_trained, newest_checkpoint
from pipeline.training.fit import eval_loader, fit, train
from pipeline.training.held_out import evaluate
from pipeline.training.reference_logps import attach_reference

CPU, ARM_LOSS = torch.device("cpu"), Loss()
CONFIG = Trainer(batch_size=2, checkpoint_every=2, evaluations_per_epoch=1, epochs=2, lr=5e-3, warmup_steps=1)


@pytest.fixture
def groups(prompter):
    prompts = ["Describe a rainy Monday.", "Tips?", "Why?", "What is tea?", "Tell me a joke.", "How was it?", "And?"]
    rows = [
        {"id": f"{p}{n}", "prompt": prompt, "chosen": f"{'good great ' * (n + 1)}love", "rejected": bad}
        for p, prompt in enumerate(prompts)
        for n, bad in enumerate(("bad awful", "sad"))
    ]
    return tokenise(rows, prompter, 256, "rows").groups


def new_module(tiny, smoke_params, dropout=0.1, config=CONFIG, beta=0.1, loss=ARM_LOSS, tuning="lora"):
    arm = dataclasses.replace(smoke_params.arm, dropout=dropout, tuning=tuning)
    model = trainable(load_model(tiny, torch.float32, CPU), arm, 0, CPU, config.gradient_checkpointing)
    return ARM(ResponseModel(model, torch.float32), [(beta, 1.0)], loss, config, 4 * config.epochs, 0)


def fitted(module, groups, folder, config=CONFIG):
    _, best = fit(module, groups, eval_loader(groups[:2], 2, 0), config, folder, False, 0, 0, CPU)
    load_trained(module, best)


def adapter(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def test_training_learns_and_keeps_the_best_step(tiny, smoke_params, groups, tmp_path):
    module = new_module(
        tiny, smoke_params, dropout=0.0, config=dataclasses.replace(CONFIG, epochs=6, lr=2e-2), beta=1.0
    )
    loader = eval_loader(groups, 2, 0)
    before = evaluate(module.model, ARM_LOSS, loader, CPU, Bootstrap(0.95, 50, 0)).accuracy
    fitted(module, groups, tmp_path, dataclasses.replace(CONFIG, epochs=6, lr=2e-2))
    after = evaluate(module.model, ARM_LOSS, loader, CPU, Bootstrap(0.95, 50, 0)).accuracy
    assert after.value > before.value and after.value > 0.8
    losses = [row["loss"] for row in module.history if row["phase"] == "eval"]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_dropout_is_on_while_training(tiny, smoke_params, groups, tmp_path, monkeypatch):
    module, modes = new_module(tiny, smoke_params), []
    step = ARM.training_step

    def watching(self, batch, index):
        modes.extend(m.training for m in self.model.modules() if isinstance(m, torch.nn.Dropout))
        return step(self, batch, index)

    monkeypatch.setattr(ARM, "training_step", watching)
    fitted(module, groups, tmp_path)
    assert modes and all(modes)


@pytest.mark.parametrize(("micro_batch_size", "evaluations"), [(None, 1), (1, 2), (None, 4)])
@pytest.mark.parametrize("stop", range(1, 8))
def test_interrupted_and_resumed_equals_uninterrupted(
    tiny, smoke_params, groups, tmp_path, monkeypatch, stop, micro_batch_size, evaluations
):
    config = dataclasses.replace(
        CONFIG, checkpoint_every=1, micro_batch_size=micro_batch_size, evaluations_per_epoch=evaluations
    )
    whole = new_module(tiny, smoke_params, config=config)
    fitted(whole, groups, tmp_path / "whole", config)
    step = ARM.training_step

    def dying(self, batch, index):
        if self.global_step == stop and (index + 1) % self.trainer.accumulate_grad_batches == 0:
            raise ConnectionError("killed")
        return step(self, batch, index)

    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr(ARM, "training_step", dying)
        fitted(new_module(tiny, smoke_params, config=config), groups, tmp_path / "cut", config)
    assert newest_checkpoint(tmp_path / "cut").name == f"step={stop:06d}.ckpt"
    resumed = new_module(tiny, smoke_params, config=config)
    fitted(resumed, groups, tmp_path / "cut", config)
    assert resumed.history == whole.history
    assert [row["step"] for row in whole.history if row["phase"] == "train"] == list(range(8))
    for name, weight in adapter(whole).items():
        torch.testing.assert_close(adapter(resumed)[name], weight, atol=0, rtol=0)


@pytest.mark.parametrize(("epochs", "stop"), [(1, 2), (1, 4), (2, 4), (2, 8)])
def test_killed_while_evaluating_and_resumed_equals_uninterrupted(
    tiny, smoke_params, groups, tmp_path, monkeypatch, epochs, stop
):
    config = dataclasses.replace(CONFIG, checkpoint_every=1, evaluations_per_epoch=2, epochs=epochs)
    whole = new_module(tiny, smoke_params, config=config)
    fitted(whole, groups, tmp_path / "whole", config)
    step = ARM.validation_step

    def dying(self, batch, index):
        if self.global_step == stop:
            raise ConnectionError("killed")
        return step(self, batch, index)

    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr(ARM, "validation_step", dying)
        fitted(new_module(tiny, smoke_params, config=config), groups, tmp_path / "cut", config)
    resumed = new_module(tiny, smoke_params, config=config)
    fitted(resumed, groups, tmp_path / "cut", config)
    assert resumed.history == whole.history
    assert [row["step"] for row in whole.history if row["phase"] == "eval"] == list(range(2, 4 * epochs + 1, 2))
    for name, weight in adapter(whole).items():
        torch.testing.assert_close(adapter(resumed)[name], weight, atol=0, rtol=0)


def test_a_finished_run_started_again_is_the_same_run(tiny, smoke_params, groups, tmp_path, monkeypatch):
    whole = new_module(tiny, smoke_params)
    fitted(whole, groups, tmp_path)
    monkeypatch.setattr(ARM, "training_step", lambda *_: pytest.fail("trained again"))
    again = new_module(tiny, smoke_params)
    fitted(again, groups, tmp_path)
    assert again.history == whole.history and again.padding == whole.padding > 0
    assert all(torch.equal(weight, adapter(whole)[name]) for name, weight in adapter(again).items())


def test_checkpoints_hold_the_adapter_only_and_a_torn_one_is_passed_over(tiny, smoke_params, groups, tmp_path):
    module = new_module(tiny, smoke_params)
    fitted(module, groups, tmp_path)
    files = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(files) == 2
    state = torch.load(files[-1], weights_only=True)["state_dict"]
    assert state.keys() == adapter(module).keys()
    learning = sum(weight.nbytes for weight in adapter(module).values())
    frozen = sum(weight.nbytes for weight in module.parameters()) - learning
    # The adapter and Adam's two moments of it; what is around them grows with the number of tensors, not their size.
    around = 1500 * len(state) + 20_000
    assert 3 * learning < files[-1].stat().st_size < 3 * learning + around
    print(f"{learning} bytes of adapter, {frozen} frozen, {files[-1].stat().st_size} in the checkpoint")
    files[-1].write_bytes(files[-1].read_bytes()[:1000])
    with pytest.warns(UserWarning, match="going back"):
        assert newest_checkpoint(tmp_path) == files[0]


@pytest.mark.parametrize("fault", ["torn", "gone"])
def test_a_damaged_best_checkpoint_is_trained_again(tiny, smoke_params, groups, tmp_path, fault):
    whole = new_module(tiny, smoke_params)
    fitted(whole, groups, tmp_path)
    [best] = tmp_path.glob("best-*.ckpt")
    best.write_bytes(best.read_bytes()[:1000]) if fault == "torn" else best.unlink()
    again = new_module(tiny, smoke_params)
    with pytest.warns(UserWarning, match="is of no use"):
        fitted(again, groups, tmp_path)
    assert again.history == whole.history
    assert all(torch.equal(weight, adapter(again)[name]) for name, weight in adapter(whole).items())


def test_a_run_that_went_back_keeps_its_newest_states(tiny, smoke_params, groups, tmp_path, monkeypatch):
    fitted(new_module(tiny, smoke_params), groups, tmp_path)
    for file in tmp_path.glob("*.ckpt"):
        file.write_bytes(b"torn")
    step = ARM.training_step

    def dying(self, batch, index):
        if self.global_step == 5:
            raise ConnectionError("killed")
        return step(self, batch, index)

    with monkeypatch.context() as patched, pytest.raises(ConnectionError), pytest.warns(UserWarning, match="no use"):
        patched.setattr(ARM, "training_step", dying)
        fitted(new_module(tiny, smoke_params), groups, tmp_path)
    with warnings.catch_warnings(action="ignore"):
        assert newest_checkpoint(tmp_path).name == "step=000004.ckpt"


def test_whether_a_checkpoint_is_readable_is_seen_without_reading_its_tensors(tmp_path, monkeypatch):
    torch.save({"callbacks": {}, "state_dict": {"w": torch.zeros(1000)}}, tmp_path / "step=000001.ckpt")
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, mmap, **options: load(*args, mmap=mmap, **options) if mmap else {})
    assert newest_checkpoint(tmp_path)


def test_a_nan_loss_stops_and_keeps_the_last_good_checkpoint(tiny, smoke_params, groups, tmp_path, monkeypatch):
    losses = iter([1.0, 1.0, 1.0, float("nan")])
    honest = arm_module.preference_loss
    monkeypatch.setattr(arm_module, "preference_loss", lambda *args: honest(*args) * next(losses))
    with pytest.raises(UserError, match="the training loss is nan at step 3: training stopped"):
        fitted(new_module(tiny, smoke_params), groups, tmp_path)
    newest = newest_checkpoint(tmp_path)
    state = torch.load(newest, weights_only=True)["state_dict"]
    assert newest.name == "step=000002.ckpt" and all(torch.isfinite(weight).all() for weight in state.values())


def test_a_nan_gradient_stops_before_the_step(tiny, smoke_params, groups, tmp_path, monkeypatch):
    module = new_module(tiny, smoke_params)
    before = adapter(module)

    def spoil(self):
        next(p for p in self.parameters() if p.grad is not None).grad[0] = float("nan")

    monkeypatch.setattr(ARM, "on_after_backward", spoil)
    with pytest.raises(UserError, match="a gradient is not finite at step 0"):
        fitted(module, groups, tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter(module).items())


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5])
def test_micro_batches_change_nothing_but_memory(tiny, smoke_params, groups, tmp_path, micro_batch_size):
    config = dataclasses.replace(CONFIG, batch_size=4, lr=5e-2)
    whole = new_module(tiny, smoke_params, 0.0, config)
    fitted(whole, groups, tmp_path / "whole", config)
    parts = new_module(tiny, smoke_params, 0.0, config)
    fitted(parts, groups, tmp_path / "parts", dataclasses.replace(config, micro_batch_size=micro_batch_size))
    assert [row["loss"] for row in parts.history] == pytest.approx([row["loss"] for row in whole.history], abs=2e-5)
    assert [row["pairs"] for row in parts.history] == [row["pairs"] for row in whole.history]
    # Adam makes a whole step of the rounding of a gradient that is all but zero: single weights may differ.
    for name, weight in adapter(whole).items():
        assert (adapter(parts)[name] - weight).norm() < 1e-3 * weight.norm()


def test_the_whole_model_can_be_trained(tiny, smoke_params, groups, tmp_path):
    module = new_module(tiny, smoke_params, tuning="full")
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    fitted(module, groups, tmp_path, dataclasses.replace(CONFIG, lr=1e-3))
    assert all(not torch.equal(weight, before[name]) for name, weight in module.named_parameters())
    losses = [row["loss"] for row in module.history if row["phase"] == "eval"]
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_changes_no_gradient(tiny, smoke_params, groups):
    gradients = []
    for checkpointing in (False, True):
        module = new_module(tiny, smoke_params, 0.0, dataclasses.replace(CONFIG, gradient_checkpointing=checkpointing))
        for name, weight in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(len(name)))
        module.model.train()
        passes = []
        layer = module.model.causal.model.layers[0].self_attn
        handle = layer.register_forward_hook(lambda *_, seen=passes: seen.append(1))
        loss, _ = module._pairs(collate(groups[:3], 0))
        loss.mean().backward()
        handle.remove()
        assert len(passes) == 1 + checkpointing
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    for kept, computed_again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, computed_again)
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("loss", [Loss("hinge"), Loss("simpo", margin=0.5), Loss("dpo", label_smoothing=0.1)])
def test_every_loss_trains(tiny, smoke_params, groups, tmp_path, loss):
    config = dataclasses.replace(CONFIG, epochs=6, lr=2e-2)
    module = new_module(tiny, smoke_params, 0.0, config, beta=1.0, loss=loss)
    attach_reference(module.model, groups, "tiny", tmp_path, 3, 0)
    fitted(module, groups, tmp_path / "run", config)
    losses = [row["loss"] for row in module.history if row["phase"] == "eval"]
    assert losses[-1] < losses[0]
    if loss.kind == "dpo":
        assert module.history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5), "the reference is the start"


def test_the_reference_is_the_untrained_model_computed_once_and_found_again(
    tiny, smoke_params, groups, tmp_path, monkeypatch
):
    module = new_module(tiny, smoke_params)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    attach_reference(module.model, groups[:3], "tiny", tmp_path, 2, 0)
    attach_reference(module.model, groups, "tiny", tmp_path, 2, 0)
    bare = ResponseModel(load_model(tiny, torch.float32, CPU), torch.float32)
    with torch.no_grad():
        for group in groups:
            assert group.reference == pytest.approx(bare(collate([group], 0)).tolist(), abs=1e-4)
    assert len((tmp_path / "reference.jsonl").read_text().splitlines()) == len(groups)
    monkeypatch.setattr(ResponseModel, "forward", lambda *_: pytest.fail("computed again"))
    attach_reference(module.model, groups, "tiny", tmp_path, 2, 0)


def test_more_devices_than_prompts_in_a_step_are_refused(tiny, smoke_params, groups, tmp_path):
    config = dataclasses.replace(CONFIG, devices=3, strategy="ddp")
    with pytest.raises(UserError, match="3 devices cannot share the 2 prompts of a step"):
        fitted(new_module(tiny, smoke_params, config=config), groups, tmp_path, config)


ROWS = [
    {"id": f"{prompt}{split}", "prompt": prompt, "chosen": "good great love", "rejected": "bad", "split": split}
    for split in ("train", "validation", "test")
    for prompt in ("Tips?", "Why?", "What is tea?")
]


def trained(params, tiny, workspace, **changes):
    workspace.models.mkdir(exist_ok=True)
    if not (workspace.models / "tiny").exists():
        (workspace.models / "tiny").symlink_to(tiny)
    spec = dataclasses.replace(params.models["tiny"], **changes.pop("model", {}))
    params = dataclasses.replace(params, models={"tiny": spec})
    for section, values in changes.items():
        params = dataclasses.replace(params, **{section: dataclasses.replace(getattr(params, section), **values)})
    return train(arm_job(params, workspace, "positivity"), ROWS, "rows", workspace.scratch, False)


def test_runs_that_differ_in_what_they_compute_share_no_checkpoint(tiny, smoke_params, workspace):
    changes = [
        {}, {"model": {"dtype": "bfloat16"}}, {"model": {"template": "Q: {prompt} A:", "dtype": "float32"}},
        {"trainer": {"lr": 1e-4}}, {"loss": {"margin": 0.1}}, {"arm": {"rank": 4}},
    ]  # fmt: skip
    start = {"model": {"dtype": "float32"}}
    folders = [trained(smoke_params, tiny, workspace, **start | change).checkpoints for change in changes]
    assert len(set(folders)) == len(changes)
    assert trained(smoke_params, tiny, workspace, **start).checkpoints == folders[0]


def test_rows_never_reach_beyond_a_sliding_window(tiny, smoke_params, workspace, monkeypatch):
    load = load_model

    def windowed(*args):
        model = load(*args)
        model.config.sliding_window = 12
        return model

    monkeypatch.setattr("pipeline.training.fit.load_model", windowed)
    splits = trained(smoke_params, tiny, workspace).splits
    longest = max(len(g.prompt) + max(map(len, g.responses)) for part in splits.values() for g in part.groups)
    assert longest == 12 and splits["train"].truncated > 0


def test_float16_is_refused(tiny, smoke_params, workspace):
    with pytest.raises(UserError, match="its dtype is float16, whose small gradients vanish"):
        trained(smoke_params, tiny, workspace, model={"dtype": "float16"})
