import dataclasses
import json
import shutil

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from pipeline.config.errors import UserError
from pipeline.config.schema import Arm, Loss, Rival, Trainer
from pipeline.data.files import write_jsonl
from pipeline.decoding.backbone import Backbone
from pipeline.decoding.fused_lora import read_adapter
from pipeline.evaluation.statistics import Bootstrap
from pipeline.generation.methods.lookahead_cache import TextReward
from pipeline.models.loading import Source, load_model
from pipeline.models.mixtures import lanes_of_weights
from pipeline.models.prefix_scorer import PrefixValues
from pipeline.stages import tune
from pipeline.training import export, rloo
from pipeline.training.arm import ARM, trainable
from pipeline.training.batches import PromptGroup, collate
from pipeline.training.conditioned_arm import ConditionedARM, ConditionedModel, collapse, modulate
from pipeline.training.fit import ResponseModel, balanced, eval_loader, fit, optimizer_steps
from pipeline.training.held_out import evaluate
from pipeline.training.prefix_scorer import PrefixScorer, PrefixScoring, prefix_loss
from pipeline.training.reward_model import RewardModel

CPU = torch.device("cpu")
ADAPTER = Arm("tiny", targets="q_proj,v_proj")
GROUPS = [
    PromptGroup([5 + place, 6, 7], [[8, 9, 20, 1], [10, 21, 1], [30 + place, 40]], [(0, 1), (0, 2), (1, 2)], [0, 1, 1])
    for place in range(8)
]
CONFIG = Trainer(
    lr=3e-2, batch_size=4, epochs=6, warmup_steps=1, evaluations_per_epoch=1, checkpoint_every=2, accelerator="cpu"
)


def ready(tiny):
    return trainable(load_model(tiny, torch.float32, CPU), ADAPTER, 0, CPU)


def fitted(module, folder, config=CONFIG):
    fit(module, GROUPS, eval_loader(GROUPS, 4, 0), config, folder, False, 0, 0, CPU)
    return [row["loss"] for row in module.history if row["phase"] == "eval"]


@pytest.fixture(scope="module", params=["parm", "uniarm"])
def conditioned(request, tiny, tmp_path_factory):
    model = ConditionedModel(ready(tiny), torch.float32, ["warm", "short"], request.param)
    steps = optimizer_steps(GROUPS, CONFIG)
    terms = balanced([(0.5, 1.0), (0.5, 1.0)], GROUPS)
    losses = fitted(ConditionedARM(model, terms, Loss(), CONFIG, steps, 0), tmp_path_factory.mktemp("checkpoints"))
    assert losses[-1] < losses[0]
    return request.param, model.eval()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.3, 0.7), (0.5, 0.5), (0.0, 1.0)])
@torch.no_grad()
def test_an_arm_for_all_mixes_is_read_at_any_weights_as_it_was_trained(
    conditioned, tiny, base, prompter, tmp_path, weights
):
    batch, (kind, model) = collate(GROUPS[:3], 0), conditioned
    model.condition(torch.tensor(weights))
    wanted = model(batch)
    export.save(model, prompter.tokenizer, tmp_path, "tiny", "card", None)
    folders = {name: tmp_path / name for name in ("warm", "short")}
    ends = []
    for place, (name, folder) in enumerate(folders.items()):
        plain = PeftModel.from_pretrained(load_model(tiny, torch.float32, CPU), str(folder)).eval()
        ends.append(ResponseModel(plain, torch.float32)(batch))
        if weights[place] == 1.0:
            torch.testing.assert_close(ends[-1], wanted, rtol=1e-4, atol=1e-4, msg=f"PEFT reads {name} as it is")
        biased = any(update.constant_R is not None for update in read_adapter(folder, base).values())
        assert biased == (kind == "uniarm")
    assert not torch.allclose(*ends, atol=1e-2), "its weights change what it is"

    backbone = Backbone(base, prompter, folders)
    assert len(set(backbone.mixtures.values())) == 1
    [(lane, strength)] = lanes_of_weights(
        {name: 2 * share for name, share in zip(folders, weights, strict=True) if share}, backbone.mixtures
    ).items()
    assert strength == pytest.approx(2.0)
    rows, read = len(batch["ids"]), ResponseModel(backbone.adapted.model, torch.float32)
    for step in (False, True):
        backbone.adapted.serve([(lane, 0, rows)], step=step)
        torch.testing.assert_close(read(batch), wanted, rtol=1e-4, atol=1e-4)
    backbone.adapted.serve_slots(torch.tensor([weights] * rows))
    torch.testing.assert_close(read(batch), wanted, rtol=1e-4, atol=1e-4)


@given(st.floats(0, 1))
@settings(deadline=None, max_examples=20)
def test_a_modulated_layer_is_affine_in_shared_features_and_linear_in_the_weights(share):
    generator = torch.Generator().manual_seed(1)
    factor, x = torch.randn(4, 6, generator=generator).double(), torch.randn(6, generator=generator).double()
    scales, shifts = (torch.randn(2, 4, generator=generator).double() for _ in range(2))
    ends = [modulate(factor, scales, shifts, torch.tensor(end).double()) for end in ([1.0, 0.0], [0.0, 1.0])]
    mixed, shift = modulate(factor, scales, shifts, torch.tensor([share, 1 - share], dtype=torch.float64))
    one, other = (own @ x + own_shift for own, own_shift in ends)
    torch.testing.assert_close(mixed @ x + shift, share * one + (1 - share) * other)
    torch.testing.assert_close(ends[0][0] @ x, (1 + scales[0]) * (factor @ x))


def test_a_prefix_scorer_learns_on_a_base_that_stays_and_values_every_token_as_it_was_trained(
    tiny, base, prompter, tmp_path
):
    model = PrefixScorer(ready(tiny), torch.float32)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    assert not any("lora" in name for name in before)
    module = PrefixScoring(model, [(1.0, 1.0)], Loss(), CONFIG, optimizer_steps(GROUPS, CONFIG), 0)
    for group in GROUPS:
        group.objectives = []
    losses = fitted(module, tmp_path / "checkpoints")
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    export.save(model.eval(), prompter.tokenizer, tmp_path / "scorer", "tiny", "card", None)
    values, batch = PrefixValues.load(tmp_path / "scorer", base), collate(GROUPS[:2], 0)
    with torch.no_grad():
        wanted, hidden = model.of_prefixes(batch), model.hidden(batch)
    torch.testing.assert_close(values.of(hidden).gather(1, batch["label"][:, None])[:, 0], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="holds no prefix scorer of this base"):
        PrefixValues.load(tmp_path, base)


def test_the_prefix_loss_is_the_cross_entropy_of_prefixes_whatever_their_number():
    logit = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    response, one, other = torch.tensor([0, 0, 0, 1]), torch.tensor([0]), torch.tensor([1])
    p = logit.sigmoid()
    wanted = -(p[:3].log().mean() + (1 - p[3]).log()) / 2
    torch.testing.assert_close(prefix_loss(logit, response, one, other), wanted[None])


@given(st.floats(0, 1))
@settings(deadline=None, max_examples=20)
def test_the_factor_is_linear_in_the_weights_and_half_of_it_is_fixed(share):
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    cores = torch.randn(2, 2, 2, generator=generator, dtype=torch.float64)
    ends = [collapse(factor, cores, torch.tensor(end, dtype=torch.float64)) for end in ([1.0, 0.0], [0.0, 1.0])]
    mixed = collapse(factor, cores, torch.tensor([share, 1 - share], dtype=torch.float64))
    torch.testing.assert_close(mixed[:2], factor[:2])
    torch.testing.assert_close(mixed[2:], share * ends[0][2:] + (1 - share) * ends[1][2:])


def test_a_reward_model_learns_and_is_what_others_load(tiny, prompter, tmp_path):
    model = RewardModel(ready(tiny), torch.float32)
    module = ARM(model, [(1.0, 1.0)], Loss(), CONFIG, optimizer_steps(GROUPS, CONFIG), 0)
    for group in GROUPS:
        group.objectives = []
    losses = fitted(module, tmp_path / "checkpoints")
    assert losses[-1] < losses[0]
    loader = eval_loader(GROUPS, 4, 0)
    found = evaluate(model.eval(), Loss(), loader, CPU, Bootstrap(0.95, 50, 0))
    assert found.accuracy.value > 0.9
    batch = collate(GROUPS[:1], 0)
    with torch.no_grad():
        wanted = model(batch)
    assert "lm_head" not in str([name for name, p in model.named_parameters() if p.requires_grad])
    export.save(model, prompter.tokenizer, tmp_path / "rm", "tiny", "card", found)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32)
    again = PeftModel.from_pretrained(classifier, str(tmp_path / "rm")).eval()
    group = GROUPS[0]
    with torch.no_grad():
        for response, reward in zip(group.responses, wanted, strict=True):
            torch.testing.assert_close(again(torch.tensor([group.prompt + response])).logits[0, 0], reward)
    loaded = TextReward.load(Source(tiny, dtype="float32"), tmp_path / "rm", CPU)
    assert (loaded.mean, loaded.std) == (found.reward_mean, found.reward_std)


def test_objectives_count_by_their_weights_not_by_their_pairs():
    groups = [PromptGroup([5], [[1], [2]], [(0, 1)] * 4, [0, 0, 0, 1])]
    (_, often), (_, seldom) = balanced([(0.1, 0.5), (0.1, 0.5)], groups)
    assert 3 * often == pytest.approx(1 * seldom) and (3 * often + seldom) / 4 == pytest.approx(1)
    (_, often), (_, seldom) = balanced([(0.1, 0.75), (0.1, 0.25)], groups)
    assert 3 * often == pytest.approx(3 * seldom)


def test_an_unknown_rival_is_refused(smoke_params, workspace):
    params = dataclasses.replace(
        smoke_params, tune=dataclasses.replace(smoke_params.tune, rivals={"mixed": Rival({"positivity": 1.0})})
    )
    with pytest.raises(UserError, match="there is no rival mix: choose one of mixed"):
        tune.run(params, workspace, "tiny", "mix")


@pytest.fixture
def tune_by_rloo(smoke_params, workspace, tiny, monkeypatch):
    """Train a policy by RLOO; returns how often rewards were asked for, the last of `answers` times with an error."""
    pytest.importorskip("trl")
    workspace.models.mkdir(parents=True)
    workspace.model("tiny").symlink_to(tiny)
    pairs = [{"prompt": f"Why {word}?", "split": "train"} for word in ("tea", "rain", "good", "bad", "love", "sad")]
    write_jsonl(workspace.results / "prepare/pairs/conciseness.jsonl", pairs)
    of = rloo._reward

    def run(lr=3e-2, answers=100):
        rival, calls = Rival({"conciseness": 1.0}, kind="rloo", beta=0.0, lr=lr, epochs=3, max_new_tokens=6), []
        params = dataclasses.replace(
            smoke_params,
            tune=dataclasses.replace(smoke_params.tune, bases=("tiny",), rivals={"short": rival}),
            trainer=dataclasses.replace(smoke_params.trainer, batch_size=4, checkpoint_every=1),
        )

        def counted(*args):
            reward = of(*args)

            def counting(**columns):
                calls.append(columns)
                if len(calls) >= answers:
                    raise ConnectionError("killed")
                return reward(**columns)

            return counting

        monkeypatch.setattr(rloo, "_reward", counted)
        if answers < 100:
            with pytest.raises(ConnectionError):
                tune.run(params, workspace, "tiny", "short")
        else:
            tune.run(params, workspace, "tiny", "short")
        return len(calls)

    return run


def test_rloo_trains_a_policy_on_its_own_samples(tune_by_rloo, workspace, tiny):
    tune_by_rloo()
    curve = pd.read_csv(workspace.results / "tune/tiny/short/curve.csv")
    assert len(curve) >= 3 and curve.reward.notna().all()
    told = json.loads((workspace.results / "tune/tiny/short/metrics.json").read_text())
    assert told["tokens"] > 0 and told["steps"] == curve.step.max()
    assert read_adapter(workspace.rival("tiny", "short"), load_model(tiny, torch.float32, CPU))
    assert not (workspace.scratch / "train").exists() or not any((workspace.scratch / "train").iterdir())


def test_rloo_killed_while_saving_goes_on_and_never_under_other_settings(tune_by_rloo, workspace):
    tune_by_rloo(answers=3)
    [newest] = (workspace.scratch / "train").glob("*/*/checkpoint-*")
    unfinished = newest.with_name("checkpoint-90")  # as of a run killed while saving: without its last file
    shutil.copytree(newest, unfinished)
    (unfinished / "trainer_state.json").unlink()
    tune_by_rloo(answers=2, lr=1e-3)
    assert len(list((workspace.scratch / "train").glob("*/*"))) == 2, "another learning rate is another run"
    rest = tune_by_rloo()
    whole = tune_by_rloo()
    assert 0 < rest == whole - 2


def test_rloo_asks_and_ends_as_the_decoder_does(tiny, smoke_params, workspace, tmp_path, monkeypatch):
    """A control token in a prompt's text is text, and a turn ends where the template says it ends."""
    pytest.importorskip("trl")
    folder = tmp_path / "tiny"
    shutil.copytree(tiny, folder)
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", "<pad>"),
        ("generation_config.json", "eos_token_id", 0),
    ):
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(said | {key: value}))
    source = Source(folder, dtype="float32")
    prompter, ends = source.prompter(), []
    assert prompter.eos != prompter.tokenizer.eos_token_id
    trained, of = [], rloo._trainer_class

    def recording(prompter):
        class Recording(of(prompter)):
            def _generate(self, prompts):
                ids, *rest = super()._generate(prompts)
                trained.extend(zip(prompts, ids, strict=True))
                ends.extend(self.eos_token_ids)
                return ids, *rest

        return Recording

    monkeypatch.setattr(rloo, "_trainer_class", recording)
    prompts = ["Why <end> tea?", "<user>rain<reply>"]
    rival = Rival({"conciseness": 1.0}, kind="rloo", beta=0.0, max_new_tokens=4)
    params = dataclasses.replace(
        smoke_params,
        trainer=dataclasses.replace(smoke_params.trainer, batch_size=2),
        tune=dataclasses.replace(smoke_params.tune, bases=("tiny",), rivals={"short": rival}),
    )
    job = dataclasses.replace(tune.rival_job(params, workspace, "tiny", "short"), source=source)
    rloo.train(job, rival, {"conciseness": "conciseness"}, prompts, workspace.scratch, tmp_path / "policy")
    assert {prompt for prompt, _ in trained} == set(prompts)
    assert all(ids == prompter.prompt_ids(prompt) for prompt, ids in trained)
    tokenizer = prompter.tokenizer
    assert all(tokenizer(tokenizer.decode(ids))["input_ids"] != ids for _, ids in trained), (
        "as text it is another prompt"
    )
    assert prompter.eos in ends
