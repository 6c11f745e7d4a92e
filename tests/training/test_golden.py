"""The loss curve of one small run, as committed: a refactoring of training must not move it.

python -m tests.training.test_golden        # write it anew, when the mathematics has changed on purpose
"""

import csv
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import Arm, Loss, Trainer
from pipeline.training.arm import ARM, ResponseModel, trainable
from pipeline.training.batches import PromptGroup
from pipeline.training.fit import eval_loader, fit, optimizer_steps
from tests.tiny import ROOT, tiny_model

CPU, GOLDEN = torch.device("cpu"), ROOT / "tests" / "golden" / "loss_curve.csv"
CONFIG = Trainer(
    lr=2e-2, warmup_steps=2, epochs=2, batch_size=3, micro_batch_size=2, evaluations_per_epoch=1, accelerator="cpu"
)
COLUMNS = ("step", "phase", "pairs", "loss", "rewards/margins", "logps/chosen", "logps/rejected")


def random_groups(count: int, seed: int) -> list[PromptGroup]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(2, 500, (length,), generator=generator).tolist()

    return [
        PromptGroup(tokens(12), [[*tokens(8), 1] for _ in range(3)], [(0, 1), (2, 1)][: 1 + place % 2])
        for place in range(count)
    ]


def curve(folder: Path) -> list[dict[str, str]]:
    groups = random_groups(10, 0)
    model = trainable(tiny_model(500).requires_grad_(False).eval(), Arm("tiny", targets="all-linear"), 0, CPU)
    steps = optimizer_steps(groups, CONFIG)
    module = ARM(ResponseModel(model, torch.float32), [(0.1, 1.0)], Loss(), CONFIG, steps, 0)
    validation = eval_loader(random_groups(3, 1), 2, 0)
    fit(module, groups, validation, CONFIG, folder, False, 0, 0, CPU)
    return [{name: str(row[name]) for name in COLUMNS} for row in module.history]


def test_the_loss_curve_is_the_committed_one(tmp_path):
    with GOLDEN.open() as stream:
        wanted = list(csv.DictReader(stream))
    found = curve(tmp_path)
    assert [(row["step"], row["phase"], row["pairs"]) for row in found] == [
        (row["step"], row["phase"], row["pairs"]) for row in wanted
    ]
    for name in COLUMNS[3:]:
        assert [float(row[name]) for row in found] == pytest.approx(
            [float(row[name]) for row in wanted], rel=1e-3, abs=1e-4
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        rows = curve(Path(scratch))
    GOLDEN.parent.mkdir(exist_ok=True)
    with GOLDEN.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    sys.stdout.write(GOLDEN.read_text())
