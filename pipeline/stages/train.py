"""train: one ARM per objective as a plain PEFT folder, its held-out accuracy and its curve."""

import shutil
import sys
import time
from dataclasses import asdict

import pandas as pd

from pipeline import models, tracking, training
from pipeline.arm import ARM, attach_adapter
from pipeline.config import Params, UserError, Workspace
from pipeline.pairs import tokenise
from pipeline.preferences import SPLITS
from pipeline.stages import main
from pipeline.store import digest, file_digest, read_jsonl, replacing, write_json


def run(params: Params, workspace: Workspace, objective: str) -> None:
    """Train the ARM of one objective; write models/arms/<objective> and results/train/<objective>/."""
    if objective not in params.objectives:
        raise UserError(f"there is no objective {objective}: choose one of {', '.join(params.objectives)}.")
    started, config, base = time.monotonic(), params.trainer, workspace.models / "base"
    pairs_file = workspace.results / "prepare" / "pairs" / f"{objective}.jsonl"
    prompter = models.Prompter.load(base, params.base.template)
    device = models.resolve_device(config.accelerator.replace("gpu", "cuda"))
    dtype = models.resolve_dtype(params.base.dtype, device)
    model = models.load_model(base, dtype, device)
    rows = [row for _, row in read_jsonl(pairs_file)]
    context = int(model.config.max_position_embeddings)
    groups = {
        split: tokenise([row for row in rows if row["split"] == split], prompter, context, str(pairs_file))
        for split in SPLITS
    }
    beta = params.objectives[objective].beta
    identity = [models.model_digest(base), file_digest(pairs_file), beta, str(params.arm), str(config), params.seed]
    checkpoints = workspace.scratch / "train" / f"{objective}-{digest(identity)}"
    loaders = {
        split: training.eval_loader(groups[split], config.batch_size, prompter.eos) for split in ("validation", "test")
    }
    train = training.train_loader(groups["train"], config.batch_size, params.seed, prompter.eos)
    steps = training.optimizer_steps(train, config)
    module = ARM(attach_adapter(model, params.arm, params.seed), beta, config, steps, params.seed)
    with tracking.training_logger(params, objective, workspace) as logger:
        trainer = training.fit(module, train, loaders["validation"], config, checkpoints, logger)
    held_out = training.held_out_accuracy(module, loaders["test"], device, params.judge.confidence)
    out = workspace.results / "train" / objective
    with replacing(out / "curve.csv") as stream:
        pd.DataFrame(module.history).to_csv(stream, index=False)
    facts = {
        "base digest": models.model_digest(base),
        "pairs digest": file_digest(pairs_file),
        "training pairs": str(sum(len(group.pairs) for group in groups["train"])),
        "optimizer steps": str(trainer.global_step),
        "dtype": str(dtype).removeprefix("torch."),
        "held-out pair accuracy": str(held_out),
    }
    card = training.model_card(params, objective, facts)
    training.save_adapter(module.model, prompter.tokenizer, workspace.adapter(objective), params.base.name, card)
    seconds = round(time.monotonic() - started, 1)
    write_json(out / "metrics.json", {**asdict(held_out), "steps": trainer.global_step, "seconds": seconds})
    shutil.rmtree(checkpoints, ignore_errors=True)
    print(f"train: {objective}: {held_out} in {seconds} s")


if __name__ == "__main__":
    main(run, *sys.argv[1:])
