"""Accuracy of an ARM as a reward model, on pairs in the columns of RewardBench (arXiv 2403.13787)."""

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from pipeline.config.errors import UserError
from pipeline.config.schema import Model, Trainer
from pipeline.data.files import Row
from pipeline.data.sources import read
from pipeline.evaluation.statistics import Bootstrap
from pipeline.models.loading import Source, resolve_device, resolve_dtype
from pipeline.training.arm import ResponseModel
from pipeline.training.batches import tokenise
from pipeline.training.fit import eval_loader, longest
from pipeline.training.held_out import HeldOut, held_out
from pipeline.training.hub import load_arm
from pipeline.training.losses import length_normalised

REWARDS = ("sum", "mean", "ratio")
ALL = "all"  # the subset of every pair


def read_pairs(path: Path) -> tuple[list[Row], list[str]]:
    """The pairs of a file, each with the place of its subset, and the subsets by name.

    Raises:
        UserError: the file is unreadable, or a line lacks a text.
    """
    rows, subsets = [], {ALL: 0}
    for where, raw in read(path):
        for column in ("prompt", "chosen", "rejected"):
            if not isinstance(raw.get(column), str) or not raw[column].strip():
                raise UserError(f"{where} has no text {column}: RewardBench's columns are prompt, chosen, rejected.")
        place = subsets.setdefault(str(raw.get("subset") or ALL), len(subsets))
        rows.append({name: raw[name] for name in ("prompt", "chosen", "rejected")} | {"objective": place})
    return rows, list(subsets)


@torch.inference_mode()
def accuracies(
    path: Path, folder: Path, start: Source, name: str, trainer: Trainer, bootstrap: Bootstrap, spec: Model | None
) -> dict[tuple[str, str], HeldOut]:
    """For each subset, and `all`, what an ARM makes of its pairs, by each of `REWARDS`.

    Args:
        path: the file of pairs.
        folder: the ARM's.
        start: what it was made from.
        name: of that.
        trainer: says the device, how long a pair may be, and how many prompts are read at once.
        bootstrap: of the intervals.
        spec: where the ARM came from, if it was not trained here.

    Raises:
        UserError: the ARM is not there or not of `start`, or the file is not one of pairs.
    """
    rows, subsets = read_pairs(path)
    device = resolve_device(trainer.accelerator)
    dtype = resolve_dtype(start.dtype, device)
    arm = load_arm(folder, start, name, device, spec)
    before = None if isinstance(arm, PeftModel) else ResponseModel(start.load(device), dtype).eval()
    model, prompter = ResponseModel(arm.requires_grad_(False).eval(), dtype).eval(), start.prompter()
    tokenised = tokenise(rows, prompter, longest(model.causal.config, trainer), str(path))
    size = trainer.micro_batch_size or trainer.batch_size
    rewards: dict[str, list[float]] = defaultdict(list)
    lengths: list[int] = []
    pairs: list[tuple[int, int]] = []
    places: list[int] = []
    prompts: list[int] = []
    for batch in tqdm(eval_loader(tokenised.groups, size, prompter.eos), desc="rewardbench", unit="batch"):
        first, moved = len(lengths), {name: value.to(device) for name, value in batch.items()}
        logps_S, started_S = model(moved).cpu(), _start_logps(model, before, moved).cpu()
        rewards["sum"] += logps_S.tolist()
        rewards["mean"] += length_normalised(logps_S, batch["response"]).tolist()
        rewards["ratio"] += (logps_S - started_S).tolist()
        lengths += torch.bincount(batch["response"]).tolist()
        pairs += zip((batch["chosen"] + first).tolist(), (batch["rejected"] + first).tolist(), strict=True)
        places += batch["objective"].tolist()
        prompts += batch["prompt"].tolist()
    table = {}
    for place, subset in enumerate(subsets):
        own = [index for index, its in enumerate(places) if subset == ALL or its == place]
        for kind in REWARDS if own else ():
            table[subset, kind] = held_out(
                rewards[kind], rewards["sum"], lengths, [pairs[index] for index in own],
                [prompts[index] for index in own], bootstrap,
            )  # fmt: skip
    if tokenised.dropped:
        print(f"{tokenised.dropped} of {len(rows)} pairs do not fit into the model's context and are left out.")
    return table


def _start_logps(model: ResponseModel, start: ResponseModel | None, batch: dict[str, Tensor]) -> Tensor:
    """log π_start(y|x) of each response of a batch, under what the ARM was made from: logps_S."""
    if start is not None:
        return start(batch)
    assert isinstance(model.model, PeftModel)
    with model.model.disable_adapter():
        return model(batch)


def frame_of(table: dict[tuple[str, str], HeldOut]) -> pd.DataFrame:
    """A line for each subset and reward."""
    lines: list[dict[str, Any]] = []
    for (subset, kind), found in table.items():
        line: dict[str, Any] = {"subset": subset, "reward": kind}
        for name in ("accuracy", "length_matched", "chosen_longer"):
            values = asdict(getattr(found, name))
            line |= {name: values["value"], f"{name}_ci_low": values["ci_low"], f"{name}_ci_high": values["ci_high"]}
            line |= {f"{name}_pairs": values["pairs"]}
        lines.append(line)
    return pd.DataFrame(lines).round(4)
