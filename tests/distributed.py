"""One small training run over several processes, for test_distributed: the loss curve and the trained weights.

    python -m tests.distributed '{"strategy": "ddp", "devices": 2}' folder [step to die at]

The folder holds models/tiny; curve.json and arm.safetensors are written into it.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

from pipeline.config.load import to_params
from pipeline.config.workspace import Workspace
from pipeline.stages.train import arm_job
from pipeline.training.arm import ARM
from pipeline.training.fit import train
from tests.tiny import ROOT

PROMPTS = ["Describe a rainy Monday.", "Tips?", "Why?", "What is tea?", "Tell me a joke.", "How was it?", "And?"]
ROWS = [
    {"id": f"{p}{n}", "prompt": prompt, "chosen": f"{'good great ' * (n + 1)}love", "rejected": bad, "split": split}
    for split in ("train", "validation", "test")
    for p, prompt in enumerate(PROMPTS if split == "train" else PROMPTS[:2])
    for n, bad in enumerate(("bad awful", "sad"))
]
del ROWS[0]  # so that steps hold unlike numbers of pairs


def dying(self: ARM, batch: object, batch_idx: int) -> None:
    if self.global_step == int(sys.argv[3]):
        os._exit(1)


def main() -> None:
    overrides, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        params = to_params(compose("config", overrides=["experiment=smoke", "arm.targets=all-linear"]))
    trainer = dataclasses.replace(
        params.trainer, **{"batch_size": 4, "epochs": 3, "lr": 1e-2, "accelerator": "cpu", **overrides}
    )
    spec = dataclasses.replace(params.models["tiny"], dtype="float32")
    params = dataclasses.replace(params, trainer=trainer, models={"tiny": spec})
    workspace = Workspace(folder / "models", folder / "results", folder / "scratch")
    if len(sys.argv) > 3:
        ARM.on_train_batch_start = dying
    trained = train(arm_job(params, workspace, "positivity"), ROWS, "rows", workspace.scratch, False)
    if trained is not None:
        weights = {name: p.detach().contiguous() for name, p in trained.model.named_parameters() if p.requires_grad}
        save_file(weights, folder / "arm.safetensors")
        told = {"history": trained.history, "held_out": dataclasses.asdict(trained.held_out)}
        (folder / "curve.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
