"""States of a training run on disk: what is kept, which one to go on from, and how the trained weights come back."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from pipeline.training.arm import ARM


class RollingCheckpoint(Checkpoint):
    """The two newest states, every so many optimizer steps and after each evaluation.

    Where an evaluation follows a step the state is kept after it: resuming from before, Lightning would leave it out.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self._folder, self._every = folder, every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end of a step."""
        ended = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        evaluated = (batch_idx + 1) % trainer.val_check_batch == 0  # type: ignore[operator]
        if ended and not evaluated and trainer.global_step % self._every == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after each evaluation: the state names the best checkpoint, which may have changed."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self._folder / f"step={trainer.global_step:06d}.ckpt")
        if trainer.is_global_zero:  # by time: of a run that went back, what is unreadable has a higher step
            for old in sorted(self._folder.glob("step=*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path))[:-2]:
                old.unlink()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest `step=*.ckpt` to go on from; one that is unreadable, or whose best is, is passed over with a warning.

    A file is cut off where the run was killed while it was written, or the disk was full.
    """
    for path in sorted(folder.glob("step=*.ckpt"), reverse=True):
        try:
            best = _best_of(_opened(path), folder)
            if best is not None:
                _opened(best)
        except Exception as error:
            warnings.warn(f"{path} is of no use ({error}): going back to the checkpoint before it.", stacklevel=2)
        else:
            return path
    return None


def _opened(path: Path) -> dict[str, Any]:
    """A checkpoint whose tensors stay on disk: of many processes each looks, and none reads the whole of it."""
    opened: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return opened


def _best_of(state: dict[str, Any], folder: Path) -> Path | None:
    """The best checkpoint until then, None before the first evaluation.

    A run that was killed between a better one and its own state has left that one only.
    """
    named = [kept["best_model_path"] for kept in state["callbacks"].values() if kept.get("best_model_path")]
    if not named:
        return None
    best = folder / Path(named[0]).name
    return best if best.exists() else max(folder.glob("best-*.ckpt"), default=best)


def load_trained(module: ARM, checkpoint: Path) -> None:
    """Give the module the weights of a checkpoint, which holds those that were trained."""
    keys = module.load_state_dict(
        torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"], strict=False
    )
    assert not keys.unexpected_keys, f"{checkpoint} is of another ARM"
