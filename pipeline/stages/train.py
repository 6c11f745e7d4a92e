"""train: one ARM per objective as a PEFT folder or a model of its own, its held-out accuracy and its curve."""

import shutil
import sys
import time
from dataclasses import asdict

import pandas as pd

from pipeline import export, models, tracking, training
from pipeline.config import Params, UserError, Workspace
from pipeline.stages import main
from pipeline.store import digest, file_digest, read_jsonl, replacing, write_json


def run(params: Params, workspace: Workspace, objective: str) -> None:
    """Train the ARM of one objective; write models/arms/<objective> and results/train/<objective>/."""
    if objective not in params.objectives:
        raise UserError(f"there is no objective {objective}: choose one of {', '.join(params.objectives)}.")
    started, base = time.monotonic(), workspace.models / "base"
    pairs_file = workspace.results / "prepare" / "pairs" / f"{objective}.jsonl"
    rows = [row for _, row in read_jsonl(pairs_file)]
    digests = {"base digest": models.model_digest(base), "pairs digest": file_digest(pairs_file)}
    with tracking.training_logger(params, objective, workspace) as logger:
        trained = training.train(params, objective, rows, digest(digests), workspace, logger)
    if trained is None:  # another process writes
        return
    out, found = workspace.results / "train" / objective, trained.held_out
    with replacing(out / "curve.csv") as stream:
        pd.DataFrame(trained.history).to_csv(stream, index=False)
    kept, steps, seconds = trained.splits["train"], trained.steps, round(time.monotonic() - started, 1)
    facts = {
        **digests,
        "training pairs": f"{kept.pairs} ({kept.dropped} dropped, {kept.truncated} prompts truncated)",
        "optimizer steps": str(steps),
        "dtype": str(trained.model.dtype).removeprefix("torch."),
        "held-out pair accuracy": str(found.accuracy),
        "accuracy on equally long responses": str(found.length_matched),
        "chosen response longer": str(found.chosen_longer),
        "Spearman of log π_r with length": f"{found.length_correlation}",
    }
    card = export.model_card(params, objective, facts)
    tokenizer = models.Prompter.load(base, params.base.template).tokenizer
    export.save_arm(trained.model, tokenizer, workspace.adapter(objective), params.base.name, card)
    share = found.accuracy
    told = {
        "accuracy": share.value, "ci_low": share.ci_low, "ci_high": share.ci_high, "pairs": share.pairs,
        "length_matched": asdict(found.length_matched), "chosen_longer": asdict(found.chosen_longer),
        "length_correlation": found.length_correlation,
        "dropped_pairs": {split: part.dropped for split, part in trained.splits.items()},
        "truncated_prompts": {split: part.truncated for split, part in trained.splits.items()},
        "padding": round(trained.padding, 4), "steps": steps, "seconds": seconds,
    }  # fmt: skip
    write_json(out / "metrics.json", told)
    shutil.rmtree(trained.checkpoints, ignore_errors=True)
    print(f"train: {objective}: {found.accuracy} in {seconds} s")


if __name__ == "__main__":
    main(run, *sys.argv[1:])
