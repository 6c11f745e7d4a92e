"""Our losses and gradients beside TRL's, on the same batch and the same adapter."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from pipeline.config.schema import Loss
from pipeline.models.loading import load_model
from pipeline.training.arm import ResponseModel
from pipeline.training.batches import PromptGroup, collate
from pipeline.training.losses import implicit_rewards, preference_loss
from pipeline.training.reference_logps import attach_reference

CPU = torch.device("cpu")
GROUPS = [
    PromptGroup([2, 40, 41, 42, 1, 3], [[50, 51, 52, 1], [60, 61, 1], [70, 71, 72, 73, 74]], [(0, 1), (2, 0)]),
    PromptGroup([2, 43, 1, 3], [[53, 1], [62, 63, 64, 65, 66, 1]], [(1, 0)]),
]
ROW = Dataset.from_list([{"prompt": "Why?", "chosen": "good", "rejected": "bad"}])
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def built(trainer_class, config_class, tiny, prompter, folder, **options):
    """A TRL trainer with an adapter that is not at its start, and ours of the same weights."""
    config = config_class(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], beta=0.3, max_length=64,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    base = load_model(tiny, torch.float32, CPU)
    trainer = trainer_class(
        model=base, args=config, train_dataset=ROW, processing_class=prompter.tokenizer, peft_config=LORA
    )
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    trainer.model.eval()
    return trainer, ResponseModel(trainer.model, torch.float32)


def triples():
    return [
        {"prompt_ids": g.prompt, "chosen_ids": g.responses[good], "rejected_ids": g.responses[bad]}
        for g in GROUPS
        for good, bad in g.pairs
    ]


def cpo_batch():
    batch = {}
    for side in ("chosen", "rejected"):
        rows = [(row["prompt_ids"], row[f"{side}_ids"]) for row in triples()]
        width = max(len(prompt) + len(response) for prompt, response in rows)
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        for key, fill in fills.items():
            parts = {
                "input_ids": [prompt + response for prompt, response in rows],
                "attention_mask": [[1] * (len(prompt) + len(response)) for prompt, response in rows],
                "labels": [[-100] * len(prompt) + response for prompt, response in rows],
            }[key]
            batch[f"{side}_{key}"] = torch.tensor([part + [fill] * (width - len(part)) for part in parts])
    return batch


def gradients(model, loss):
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(learning, torch.autograd.grad(loss, learning.values()), strict=True))


def ours(model, loss, groups=GROUPS):
    batch = collate(groups, 0)
    rewards = implicit_rewards(loss, model(batch), batch["response"], batch.get("reference"))
    return preference_loss(loss, rewards[batch["chosen"]], rewards[batch["rejected"]], 0.3).mean()


def assert_equal(model, mine, theirs):
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    found, wanted = gradients(model.model, mine), gradients(model.model, theirs)
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-3
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"loss_type": "sigmoid"}, Loss("arm")),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, Loss("arm", label_smoothing=0.1)),
        ({"loss_type": "hinge"}, Loss("hinge")),
        ({"loss_type": "simpo", "simpo_gamma": 0.4}, Loss("simpo", margin=0.4)),
    ],
)
def test_reference_free_losses_and_gradients_are_those_of_trl(tiny, prompter, tmp_path, options, loss):
    trainer, model = built(CPOTrainer, CPOConfig, tiny, prompter, tmp_path, cpo_alpha=0.0, **options)
    theirs, _ = trainer.get_batch_loss_metrics(trainer.model, cpo_batch())
    assert_equal(model, ours(model, loss), theirs)


def test_dpo_loss_and_gradients_are_those_of_trl(tiny, prompter, tmp_path):
    trainer, model = built(DPOTrainer, DPOConfig, tiny, prompter, tmp_path, loss_type=["sigmoid"])
    groups = [dataclasses.replace(group) for group in GROUPS]
    attach_reference(model, groups, "tiny", tmp_path, 2, 0)
    theirs = trainer._compute_loss(trainer.model, DataCollatorForPreference(pad_token_id=0)(triples()), False)
    assert_equal(model, ours(model, Loss("dpo"), groups), theirs)
