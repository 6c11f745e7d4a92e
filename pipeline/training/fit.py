"""One training run of an ARM, from its pairs to its best weights, on one device or many."""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, PreTrainedModel

from pipeline.config.errors import UserError
from pipeline.config.schema import Arm, Loss, Trainer
from pipeline.data.files import Row, digest
from pipeline.data.splits import SPLITS
from pipeline.evaluation.statistics import Bootstrap
from pipeline.models import memory
from pipeline.models.architecture import text_config
from pipeline.models.loading import Source, load_model, resolve_device, resolve_dtype
from pipeline.training.arm import ARM, ResponseModel, trainable
from pipeline.training.batches import PromptGroup, ResumableLoader, StepBatches, Tokenised, collate, tokenise
from pipeline.training.checkpoints import RollingCheckpoint, load_trained, newest_checkpoint
from pipeline.training.conditioned_arm import ConditionedARM, ConditionedModel
from pipeline.training.held_out import HeldOut, evaluate
from pipeline.training.prefix_scorer import PrefixScorer, PrefixScoring
from pipeline.training.reference_logps import attach_reference
from pipeline.training.reward_model import RewardModel


@dataclass(frozen=True)
class Job:
    """What is to be trained, and how."""

    name: str  # of an ARM its objective's, or `all`
    kind: Literal["arm", "dpo", "parm", "uniarm", "reward_model", "prefix_scorer", "rloo"]
    terms: Mapping[str, tuple[float, float]]  # for each objective that pairs are of: β, and how much the pairs count
    start: str  # the name of the model that it starts from
    source: Source  # that model
    arm: Arm
    loss: Loss
    trainer: Trainer
    seed: int
    bootstrap: Bootstrap  # of the intervals of held-out accuracies

    def model(self, loaded: PreTrainedModel | PeftModel, dtype: torch.dtype) -> ResponseModel:
        """What is trained, of a model that `trainable` made ready."""
        if self.kind in ("parm", "uniarm"):
            return ConditionedModel(loaded, dtype, tuple(self.terms), self.kind)
        others = {"reward_model": RewardModel, "prefix_scorer": PrefixScorer}
        return others.get(self.kind, ResponseModel)(loaded, dtype)


@dataclass(frozen=True)
class Trained:
    """A finished ARM, and what there is to say about it."""

    model: ResponseModel
    history: list[dict[str, float]]
    padding: float  # the share of computed positions that held no token
    held_out: HeldOut
    splits: dict[str, Tokenised]
    steps: int
    checkpoints: Path  # of no use any more once the ARM is saved
    # Of an ARM for all mixes: where one objective has all the weight, on that one's pairs.
    ends: Mapping[str, HeldOut] = field(default_factory=dict)


def train(job: Job, rows: Sequence[Row], identity: str, scratch: Path, logger: Logger | bool) -> Trained | None:
    """Train on pairs, or go on where a killed run of the same job and identity stopped.

    Args:
        job: what is trained.
        rows: pairs with their split, and the place of their objective in `job.terms` where there are several.
        identity: digest of the model it starts from and the pairs.
        scratch: the folder that checkpoints and references survive in.
        logger: Lightning's.

    Returns:
        The ARM with its best weights; None in all processes but the first.

    Raises:
        UserError: the rows or the model cannot be trained on, or a loss or gradient is not finite.
    """
    arm, config, source = job.arm, job.trainer, job.source
    device, sharded = resolve_device(config.accelerator), config.strategy == "fsdp"
    dtype = resolve_dtype(source.dtype, device)
    if dtype == torch.float16:
        raise UserError(
            f"{job.start}: its dtype is float16, whose small gradients vanish: train in bfloat16 or float32."
        )
    # What is trained whole, or sharded over devices, keeps float32 master weights and computes in the base's dtype.
    master = torch.float32 if arm.tuning == "full" or sharded else dtype

    shape = memory.shape_of(AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False))
    shards = _world_size(config, device) if sharded else 1
    memory.refuse_training_too_large(shape, job.start, dtype, source.quantisation, arm.tuning == "full", shards, device)

    def untrained(master: torch.dtype, place: torch.device) -> ResponseModel:
        loaded = load_model(source.folder, master, place, source.quantisation)
        return job.model(trainable(loaded, arm, job.seed, device, config.gradient_checkpointing), dtype)

    # What is sharded goes to its devices layer by layer: no device ever holds the whole of it.
    model = untrained(master, torch.device("cpu") if sharded else device)
    prompter = source.prompter()
    max_length = longest(model.causal.config, config)
    splits = {
        split: tokenise([row for row in rows if row["split"] == split], prompter, max_length, f"{job.name}, {split}")
        for split in SPLITS
    }
    size, computing = config.micro_batch_size or config.batch_size, [str(master), str(dtype), source.quantisation]
    if job.loss.kind == "dpo":
        for split in splits.values():
            key, store = digest([identity, computing]), scratch / "store"
            attach_reference(model, split.groups, key, store, size, prompter.eos)
    groups = splits["train"].groups
    kinds = {"parm": ConditionedARM, "uniarm": ConditionedARM, "prefix_scorer": PrefixScoring}
    terms = balanced(list(job.terms.values()), groups)
    module = kinds.get(job.kind, ARM)(model, terms, job.loss, config, optimizer_steps(groups, config), job.seed)
    run = [identity, computing, source.template, job.kind, terms, *map(str, (arm, job.loss, config)), job.seed]
    own = digest([*run, _world_size(config, device)])
    validation, test = (eval_loader(splits[split].groups, size, prompter.eos) for split in ("validation", "test"))
    checkpoints = scratch / "train" / f"{job.name}-{own}"
    trainer, best = fit(module, groups, validation, config, checkpoints, logger, job.seed, prompter.eos, device)
    if not trainer.is_global_zero:
        return None
    if sharded:
        module.model = model = untrained(dtype, device)
    load_trained(module, best)
    held_out, ends = evaluate(model, job.loss, test, device, job.bootstrap), dict[str, HeldOut]()
    if isinstance(model, ConditionedModel):
        for place, objective in enumerate(job.terms):
            model.condition(model.alone(place))
            pairs = [row for row in rows if row["split"] == "test" and row["objective"] == place]
            of_objective = tokenise(pairs, prompter, max_length, f"{job.name}, test of {objective}")
            loader = eval_loader(of_objective.groups, size, prompter.eos)
            ends[objective] = evaluate(model, job.loss, loader, device, job.bootstrap)
    return Trained(model, module.history, module.padding, held_out, splits, trainer.global_step, checkpoints, ends)


def longest(reach: Any, config: Trainer) -> int:
    """Tokens of a prompt and a response together, at most.

    Within a sliding window all layers see all of a row: beyond it training would show them more than decoding does.

    Args:
        reach: the config of the model.
    """
    reach = text_config(reach)
    limits = config.max_length, reach.max_position_embeddings, getattr(reach, "sliding_window", None)
    return min(limit for limit in limits if limit)


def balanced(terms: Sequence[tuple[float, float]], groups: Sequence[PromptGroup]) -> list[tuple[float, float]]:
    """β and weight of each objective's pairs.

    Objectives count by their weights and not by how many pairs they have; pairs have weight 1 on average.
    """
    counts = Counter(objective for group in groups for objective in group.objectives or [0] * len(group.pairs))
    share = sum(counts.values()) / sum(weight for _, weight in terms)
    return [(beta, weight * share / max(1, counts[place])) for place, (beta, weight) in enumerate(terms)]


def optimizer_steps(groups: Sequence[PromptGroup], config: Trainer) -> int:
    """Optimizer steps of a whole run."""
    return config.epochs * math.ceil(len(groups) / config.batch_size)


def eval_loader(groups: Sequence[PromptGroup], batch_size: int, pad: int) -> DataLoader[Any]:
    """Held-out prompts with their pairs, neighbours of like length, for little padding."""
    ordered = sorted(groups, key=len)
    return DataLoader(cast(Dataset[PromptGroup], ordered), batch_size=batch_size, collate_fn=partial(collate, pad=pad))


def fit(
    module: ARM,
    groups: Sequence[PromptGroup],
    validation: DataLoader[Any],
    config: Trainer,
    checkpoints: Path,
    logger: Logger | bool,
    seed: int,
    pad: int,
    device: torch.device,
) -> tuple[L.Trainer, Path]:
    """Train from the newest checkpoint in `checkpoints`, or from the start.

    The validation pairs are few: every process computes all of them.

    Returns:
        The trainer, and the checkpoint with the lowest loss on validation pairs.

    Raises:
        UserError: a loss or gradient is not finite, or there are more devices than prompts in a step.
    """
    world_size = _world_size(config, device)
    if world_size > config.batch_size:
        raise UserError(
            f"{world_size} devices cannot share the {config.batch_size} prompts of a step: raise trainer.batch_size."
        )
    trainer, best = _trainer(config, device, len(groups), checkpoints, logger)
    batches = StepBatches(groups, config.batch_size, seed, trainer.accumulate_grad_batches, world_size)
    resume = newest_checkpoint(checkpoints)
    if resume is not None:
        print(f"train: going on from {resume}")
    train = ResumableLoader(groups, batches, pad)
    trainer.fit(module, train, validation, ckpt_path=resume, weights_only=True)
    assert best.best_model_path, "no evaluation took place"
    return trainer, Path(best.best_model_path)


def _trainer(
    config: Trainer, device: torch.device, prompts: int, checkpoints: Path, logger: Logger | bool
) -> tuple[L.Trainer, ModelCheckpoint]:
    world_size = _world_size(config, device)
    own = math.ceil(config.batch_size / world_size)
    accumulate = math.ceil(own / (config.micro_batch_size or own))
    steps = math.ceil(prompts / config.batch_size)
    best = ModelCheckpoint(
        dirpath=checkpoints, filename="best-step={step:06d}", auto_insert_metric_name=False, monitor="eval/loss",
        mode="min", save_weights_only=True, save_on_train_epoch_end=False, enable_version_counter=False,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator=device.type,
        devices=world_size // config.num_nodes,
        num_nodes=config.num_nodes,
        strategy=_strategy(config, world_size),
        max_epochs=config.epochs,
        accumulate_grad_batches=accumulate,
        val_check_interval=accumulate * max(1, steps // config.evaluations_per_epoch),
        gradient_clip_val=config.gradient_clip,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        # The state knows the best. Lightning's own bar shows nothing before the end to a log or a program that reads.
        callbacks=[
            best,
            RollingCheckpoint(checkpoints, config.checkpoint_every),
            *([] if sys.stdout.isatty() else [TQDMProgressBar()]),
        ],
        logger=logger,
        default_root_dir=checkpoints,
        enable_model_summary=False,
        use_distributed_sampler=False,  # `StepBatches` deals a step's prompts out over the processes itself
    )
    return trainer, best


def _strategy(config: Trainer, world_size: int) -> Any:
    if config.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return config.strategy


def _world_size(config: Trainer, device: torch.device) -> int:
    """Processes that train together; `auto` is all GPUs of a machine, or one CPU."""
    each = config.devices if config.devices != "auto" else max(1, torch.cuda.device_count())
    return config.num_nodes * (1 if config.devices == "auto" and device.type == "cpu" else int(each))
