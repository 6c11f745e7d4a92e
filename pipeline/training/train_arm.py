"""One ARM from pairs, by a function call: what the stage `train` does, without a project around it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.config.errors import UserError
from pipeline.config.schema import Arm, Loss, Trainer
from pipeline.data.files import Row, digest
from pipeline.data.splits import SPLITS
from pipeline.evaluation.statistics import Bootstrap
from pipeline.models.loading import Source, model_digest
from pipeline.training import export
from pipeline.training.fit import Job, train

_FIELDS = ("prompt", "chosen", "rejected", "split")


def train_arm(
    base: Path,
    pairs: Iterable[Mapping[str, Any]],
    folder: Path,
    *,
    beta: float = 0.1,
    template: str | None = None,
    arm: Arm | None = None,
    loss: Loss | None = None,
    trainer: Trainer | None = None,
    seed: int = 0,
) -> Row:
    """Train an ARM on preference pairs; write it to a folder with its tokenizer and model card.

        metrics = train_arm(Path("models/smollm2-135m"), pairs, Path("my-arm"), beta=0.02)

    Args:
        base: the folder of the model that the ARM is made from.
        pairs: texts `prompt`, `chosen`, `rejected`, and `split` (train, validation or test); optionally `chosen_ended`,
            `rejected_ended`, false where a response was cut at a length limit.
        folder: of the ARM: a PEFT adapter, or a whole model where `arm.tuning` is full. Its name is the objective's.
        beta: β_r of the loss.
        template: text with {prompt}; None: the tokenizer's chat template.
        arm: LoRA, its rank and targets, or all weights; None: the defaults of `Arm`.
        loss: None: the ARM loss of the GenARM paper.
        trainer: learning rate, batch size, epochs, devices; None: the defaults of `Trainer`.
        seed: of the initialisation and of the order of the pairs.

    Returns:
        Held-out `accuracy` with `ci_low` and `ci_high`, `pairs`, `steps` and more, as in results/train/*/metrics.json.

    Raises:
        UserError: a pair lacks a field, a split has no pairs, or the model cannot be trained on them.
    """
    base, folder = Path(base), Path(folder)
    rows = [_checked(number, pair) for number, pair in enumerate(pairs)]
    for split in SPLITS:
        if not any(row["split"] == split for row in rows):
            raise UserError(f"there is no pair of split {split}: an ARM needs some of each of {', '.join(SPLITS)}.")
    source, config = Source(base, template), trainer or Trainer()
    job = Job(
        folder.name, "arm", {folder.name: (beta, 1.0)}, base.name, source, arm or Arm(base=base.name), loss or Loss(),
        config, seed, Bootstrap(seed=seed),
    )  # fmt: skip
    digests = {"base digest": model_digest(base), "pairs digest": digest(rows)}
    with TemporaryDirectory() as scratch:
        trained = train(job, rows, digest(digests), Path(scratch), logger=False)
        if trained is None:  # another process writes
            return {}
        card = export.model_card(job, "unknown", digests, trained)
        export.save(trained.model, source.prompter().tokenizer, folder, job.start, card, trained.held_out)
    return export.metrics(trained.held_out, trained, config.epochs)


def _checked(number: int, pair: Mapping[str, Any]) -> Row:
    for field in _FIELDS:
        if not isinstance(pair.get(field), str):
            raise UserError(f"pair {number} has no text {field}: every pair needs {', '.join(_FIELDS)}.")
    if pair["split"] not in SPLITS:
        raise UserError(f"pair {number} has split {pair['split']!r}: use one of {', '.join(SPLITS)}.")
    return {**pair, "objective": 0}  # the place of its objective, where there are several
