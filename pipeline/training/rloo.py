"""An RLHF reference by TRL: a policy trained on its own samples against the scorers (RLOO, Ahmadian et al. 2024).

It sees the very scores that the judge gives, which no other method does: an upper line, and optional (extra `rlhf`).
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from pipeline.config.errors import UserError
from pipeline.config.schema import Arm, Rival
from pipeline.data.files import Row, digest, replacing_folder
from pipeline.data.oracles import scorer
from pipeline.models.loading import resolve_device, resolve_dtype
from pipeline.models.prompting import Prompter, ends_of
from pipeline.training.fit import Job


def train(
    job: Job,
    rival: Rival,
    scorers: Mapping[str, str | None],
    prompts: Sequence[str],
    scratch: Path,
    folder: Path,
) -> tuple[list[Row], int]:
    """Train a LoRA policy of a base on Σ_i w_i · score_i of its own responses, and write its adapter.

    A killed run of the same policy goes on from its newest checkpoint.

    Args:
        job: the base, the adapter, settings of training, the seed.
        rival: weights, β of the KL to the base, learning rate, epochs over the prompts.
        scorers: the name of the scorer of each objective that has a weight.
        prompts: to answer while training.
        scratch: the folder of checkpoints, below which every policy has its own.
        folder: of the adapter.

    Returns:
        TRL's log as rows of the curve, and the tokens that training computed.

    Raises:
        UserError: TRL is not installed, or an objective has no scorer.
    """
    try:
        from datasets import Dataset
        from trl import RLOOConfig
    except ImportError as error:
        raise UserError("kind: rloo needs TRL: pip install 'genarm-pipeline[rlhf]'.") from error
    source, settings = job.source, job.trainer
    device = resolve_device(settings.accelerator)
    prompter = source.prompter()
    tokenizer: Any = prompter.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    checkpoints = scratch / _identity(job, rival, scorers, device, prompts)
    config = RLOOConfig(
        output_dir=str(checkpoints), per_device_train_batch_size=settings.batch_size * rival.samples,
        num_generations=rival.samples, max_completion_length=rival.max_new_tokens, temperature=1.0,
        beta=rival.beta or 0.0, learning_rate=rival.lr, lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_steps, weight_decay=settings.weight_decay,
        max_grad_norm=settings.gradient_clip, num_train_epochs=rival.epochs, seed=job.seed, logging_steps=1,
        save_steps=settings.checkpoint_every, save_total_limit=1, report_to="none", use_cpu=device.type == "cpu",
        bf16=resolve_dtype(source.dtype, device) == torch.bfloat16, gradient_checkpointing=False,
    )  # fmt: skip
    model: Any = source.load(device).requires_grad_(True)
    model.generation_config.eos_token_id = sorted(ends_of(prompter, model.generation_config))  # as in decoding
    trainer = _trainer_class(prompter)(
        model=model, reward_funcs=_reward(rival, scorers, prompter), args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer, peft_config=_lora(job.arm),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=_newest(checkpoints))
    policy: Any = trainer.accelerator.unwrap_model(trainer.model)
    with replacing_folder(folder) as unfinished:
        policy.save_pretrained(str(unfinished), save_embedding_layers=False)
        tokenizer.save_pretrained(str(unfinished))
    history = [
        {"step": entry["step"], "phase": "train", "loss": entry["loss"], "reward": entry["reward"]}
        for entry in trainer.state.log_history
        if "reward" in entry
    ]
    return history, int(trainer.state.num_input_tokens_seen)


def _identity(
    job: Job, rival: Rival, scorers: Mapping[str, str | None], device: torch.device, prompts: Sequence[str]
) -> str:
    """Digest of all that the policy depends on, which its checkpoints are kept by."""
    settings = [asdict(rival), asdict(job.arm), asdict(job.trainer), job.seed]
    return digest([job.source.identity(device), settings, scorers, list(prompts)])


def _newest(checkpoints: Path) -> str | None:
    """The newest checkpoint written to its end; one without its state, which is written last, is removed."""
    finished: list[tuple[int, str]] = []
    for folder in checkpoints.glob("checkpoint-*"):
        try:
            state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        except (OSError, ValueError, TypeError):  # missing or torn: the run was killed, or the disk was full
            shutil.rmtree(folder)
        else:
            finished.append((state.global_step, str(folder)))
    return max(finished)[1] if finished else None


def _trainer_class(prompter: Prompter) -> Any:
    """TRL's trainer on prompts as the pipeline spells them: a control token in a text is text, a template's is not."""
    from trl import RLOOTrainer

    class PromptedTrainer(RLOOTrainer):  # type: ignore[misc, unused-ignore]
        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            """Token ids per prompt; there are no images."""
            return [prompter.prompt_ids(prompt) for prompt in prompts], None, {}

    return PromptedTrainer


def _reward(rival: Rival, names: Mapping[str, str | None], prompter: Prompter) -> Any:
    """What TRL asks for: the reward of every completion, as the text that its tokens spell in a generated row."""
    scorers = {}
    for name in rival.weights:
        kind = names[name]
        if kind is None:
            raise UserError(f"objectives.{name} has no scorer to train against: set objectives.{name}.scorer.")
        scorers[name] = scorer(kind)

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        texts = [prompter.spell(ids) for ids in completion_ids]
        return [sum(rival.weights[name] * score(text) for name, score in scorers.items()) for text in texts]

    return reward


def _lora(arm: Arm) -> LoraConfig:
    targets: str | list[str] = arm.targets if arm.targets == "all-linear" else sorted(arm.targets.split(","))
    return LoraConfig(r=arm.rank, lora_alpha=arm.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
