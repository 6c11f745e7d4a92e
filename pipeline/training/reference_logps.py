"""Log-probabilities under the reference, which is the base before any training: computed once and kept."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm

from pipeline.data.files import digest
from pipeline.data.row_store import RowStore
from pipeline.training.arm import ResponseModel
from pipeline.training.batches import PromptGroup, collate


@torch.no_grad()
def attach_reference(
    model: ResponseModel, groups: Sequence[PromptGroup], identity: str, folder: Path, batch_size: int, pad: int
) -> None:
    """Write log π_ref of every response into its group, π_ref being the base before any training.

    Values are computed once and kept in a store: a run that was killed, another seed or another β finds them.

    Args:
        model: what is to be trained, not yet trained.
        groups: those that get a reference.
        identity: digest of what the values depend on beside the tokens: the base and the precision.
        folder: where the store is.
        batch_size: prompts per forward.
        pad: the padding token.
    """
    keys = [digest([identity, group.prompt, group.responses]) for group in groups]
    store = RowStore(folder / f"reference{_rank()}.jsonl", keys)
    missing = {key: group for key, group in zip(keys, groups, strict=True) if key not in store}
    ordered = sorted(missing, key=lambda key: len(missing[key]))
    device = next(model.parameters()).device
    model.eval()
    for start in tqdm(range(0, len(ordered), batch_size), desc="reference", disable=not ordered):
        taken = ordered[start : start + batch_size]
        batch = {name: value.to(device) for name, value in collate([missing[key] for key in taken], pad).items()}
        if isinstance(model.model, PeftModel):
            with model.model.disable_adapter():
                logps = iter(model(batch).tolist())
        else:
            logps = iter(model(batch).tolist())
        store.add([(key, {"logps": [next(logps) for _ in missing[key].responses]}) for key in taken])
    for key, group in zip(keys, groups, strict=True):
        group.reference = store[key]["logps"]


def _rank() -> str:
    """A suffix for the files of a process that runs beside the first, so that no two write to one.

    Processes that Lightning has started come after the first has written, and read what it wrote.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0") if "LOCAL_RANK" not in os.environ else "0")
    return "" if rank == "0" else f"-{rank}"
