"""Accuracy of an ARM as a reward model, on pairs in the columns of RewardBench (arXiv 2403.13787)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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


@dataclass
class PairRewards:
    """What an ARM makes of pairs, by each of `REWARDS`."""

    dropped: int  # pairs that do not fit into its context
    rewards: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in REWARDS})  # of responses
    lengths: list[int] = field(default_factory=list)  # tokens of the responses
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (chosen, rejected) as places among the responses
    places: list[int] = field(default_factory=list)  # of each pair: its row's `objective`
    prompts: list[int] = field(default_factory=list)  # of each pair: the number of its prompt

    def among(self, kind: str, chosen: Sequence[int], bootstrap: Bootstrap) -> HeldOut:
        """How right a reward is on some of the pairs.

        Args:
            kind: one of `REWARDS`.
            chosen: places among `pairs`.
            bootstrap: of the intervals.
        """
        pairs, prompts = [self.pairs[place] for place in chosen], [self.prompts[place] for place in chosen]
        return held_out(self.rewards[kind], self.rewards["sum"], self.lengths, pairs, prompts, bootstrap)


@torch.inference_mode()
def pair_rewards(
    rows: Sequence[Row], what: str, folder: Path, start: Source, name: str, trainer: Trainer, spec: Model | None = None
) -> PairRewards:
    """The rewards of pairs by an ARM.

    Args:
        rows: `prompt`, `chosen`, `rejected`, `objective`.
        what: where they are from, for messages.
        folder: the ARM's.
        start: what it was made from.
        name: of that.
        trainer: says the device, how long a pair may be, and how many prompts are read at once.
        spec: where the ARM came from, if it was not trained here.

    Raises:
        UserError: the ARM is not there or not of `start`.
    """
    device = resolve_device(trainer.accelerator)
    dtype = resolve_dtype(start.dtype, device)
    arm = load_arm(folder, start, name, device, spec)
    before = None if isinstance(arm, PeftModel) else ResponseModel(start.load(device), dtype).eval()
    model, prompter = ResponseModel(arm.requires_grad_(False).eval(), dtype).eval(), start.prompter()
    tokenised = tokenise(rows, prompter, longest(model.causal.config, trainer), what)
    size = trainer.micro_batch_size or trainer.batch_size
    found = PairRewards(tokenised.dropped)
    for batch in tqdm(eval_loader(tokenised.groups, size, prompter.eos), desc="rewardbench", unit="batch"):
        first, moved = len(found.lengths), {name: value.to(device) for name, value in batch.items()}
        logps_S, started_S = model(moved).cpu(), _start_logps(model, before, moved).cpu()
        found.rewards["sum"] += logps_S.tolist()
        found.rewards["mean"] += length_normalised(logps_S, batch["response"]).tolist()
        found.rewards["ratio"] += (logps_S - started_S).tolist()
        found.lengths += torch.bincount(batch["response"]).tolist()
        found.pairs += zip((batch["chosen"] + first).tolist(), (batch["rejected"] + first).tolist(), strict=True)
        found.places += batch["objective"].tolist()
        found.prompts += batch["prompt"].tolist()
    return found


def accuracies(
    path: Path, folder: Path, start: Source, name: str, trainer: Trainer, bootstrap: Bootstrap, spec: Model | None
) -> dict[tuple[str, str], HeldOut]:
    """For each subset, and `all`, what an ARM makes of its pairs, by each of `REWARDS`.

    Args:
        path: the file of pairs.
        bootstrap: of the intervals.
        folder, start, name, trainer, spec: as in `pair_rewards`.

    Raises:
        UserError: the ARM is not there or not of `start`, or the file is not one of pairs.
    """
    rows, subsets = read_pairs(path)
    found = pair_rewards(rows, str(path), folder, start, name, trainer, spec)
    table = {}
    for place, subset in enumerate(subsets):
        own = [index for index, its in enumerate(found.places) if subset == ALL or its == place]
        for kind in REWARDS if own else ():
            table[subset, kind] = found.among(kind, own, bootstrap)
    if found.dropped:
        print(f"{found.dropped} of {len(rows)} pairs do not fit into the model's context and are left out.")
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
