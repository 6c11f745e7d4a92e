"""Accuracy of an ARM as a reward model, on pairs in the columns of RewardBench (arXiv 2403.13787).

    python -m pipeline rewardbench reward-bench.parquet --objective helpfulness --out results/rewardbench.csv

The file (JSON Lines, JSON, Parquet or CSV) has the columns `prompt`, `chosen`, `rejected` and perhaps `subset`. A pair
is right where the chosen response has the higher reward, by three rewards of the same ARM: `sum`, log π_r(y|x), which
is GenARM's; `mean`, the same per token; `ratio`, log π_r(y|x) − log π_start(y|x), DPO's implicit reward with the model
that the ARM was made from as the reference. Beside the accuracy stand what always taking the longer response scores,
and the accuracy on pairs of like length.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from pipeline.config.errors import UserError
from pipeline.config.load import load_params
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import Row, replacing
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
def accuracies(params: Params, workspace: Workspace, objective: str, path: Path) -> dict[tuple[str, str], HeldOut]:
    """For each subset, and `all`, what the ARM of an objective makes of its pairs, by each of `REWARDS`.

    Raises:
        UserError: there is no such objective, its ARM is not there, or the file is not one of pairs.
    """
    if objective not in params.objectives:
        raise UserError(f"--objective {objective}: params.yaml has the objectives {', '.join(params.objectives)}.")
    rows, subsets = read_pairs(path)
    device = resolve_device(params.trainer.accelerator)
    source = Source.of(params.models, workspace, params.arm.base)
    spec = params.objectives[objective].pretrained
    arm = load_arm(workspace.arm(objective), source, params.arm.base, device, spec)
    dtype = resolve_dtype(source.dtype, device)
    start = None if isinstance(arm, PeftModel) else ResponseModel(source.load(device), dtype).eval()
    model, prompter = ResponseModel(arm.requires_grad_(False).eval(), dtype).eval(), source.prompter()
    tokenised = tokenise(rows, prompter, longest(model.causal.config, params.trainer), str(path))
    size = params.trainer.micro_batch_size or params.trainer.batch_size
    rewards: dict[str, list[float]] = defaultdict(list)
    lengths: list[int] = []
    pairs: list[tuple[int, int]] = []
    places: list[int] = []
    prompts: list[int] = []
    for batch in tqdm(eval_loader(tokenised.groups, size, prompter.eos), desc="rewardbench", unit="batch"):
        first, moved = len(lengths), {name: value.to(device) for name, value in batch.items()}
        logps_S, started_S = model(moved).cpu(), _start_logps(model, start, moved).cpu()
        rewards["sum"] += logps_S.tolist()
        rewards["mean"] += length_normalised(logps_S, batch["response"]).tolist()
        rewards["ratio"] += (logps_S - started_S).tolist()
        lengths += torch.bincount(batch["response"]).tolist()
        pairs += zip((batch["chosen"] + first).tolist(), (batch["rejected"] + first).tolist(), strict=True)
        places += batch["objective"].tolist()
        prompts += batch["prompt"].tolist()
    bootstrap, table = Bootstrap.of(params.judge, params.seed), {}
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


def main(arguments: Sequence[str]) -> None:
    """Score a file by the ARM of an objective."""
    parser = ArgumentParser(
        "python -m pipeline rewardbench", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--objective", required=True, help="whose ARM: models/arms/<objective>")
    parser.add_argument("--out", type=Path, help="a CSV file for the table")
    options = parser.parse_args(arguments)
    found = accuracies(load_params(), Workspace(), options.objective, options.file)
    shown = Table("subset", "reward", "right", "right at like length", "the longer one is right")
    for (subset, kind), line in found.items():
        shown.add_row(subset, kind, str(line.accuracy), str(line.length_matched), str(line.chosen_longer))
    Console().print(shown)
    if options.out:
        with replacing(options.out) as stream:
            frame_of(found).to_csv(stream, index=False)
