"""How vLLM has to be started for lanes: the same for the decoder and for the server."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import UserError
from pipeline.models import Source

TOLD = "GENARM_SERVE"  # environment variable: what the server's launcher tells the middleware
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's buffers for adapters come in


def settings(base: Source, arms: Mapping[str, Path], groups: int) -> dict[str, Any]:
    """Arguments of vLLM's engine, by name, for so many guided requests at once.

    Raises:
        UserError: an ARM is no adapter, or of a higher rank than vLLM has buffers for; int8, which vLLM does not do.
    """
    if base.quantisation == "int8":
        raise UserError("vLLM does not quantise to int8 on loading: set the base's quantisation to nf4 or null.")
    found: dict[str, Any] = {
        "model": str(base.folder), "dtype": base.dtype, "max_num_seqs": groups * (1 + len(arms)),
        "enable_chunked_prefill": False, "async_scheduling": False, "enforce_eager": True,
        "logits_processors": ["pipeline.engines.vllm.processor:LaneProcessor"],
        "scheduler_cls": "pipeline.engines.vllm.scheduler.GroupScheduler",
    }  # fmt: skip
    if base.quantisation == "nf4":
        found["quantization"] = "bitsandbytes"
    if arms:
        # One slot more than adapters: on CPUs rows without an adapter read the last slot, which has to be empty.
        rank = max(_rank(name, folder) for name, folder in arms.items())
        found |= {"enable_lora": True, "max_loras": len(arms) + 1, "max_lora_rank": rank}
    return found


def _rank(name: str, folder: Path) -> int:
    """The least of vLLM's ranks that has room for an adapter."""
    told = folder / "adapter_config.json"
    if not told.is_file():
        raise UserError(f"{name} in {folder} is no LoRA adapter of the base: use decoding.engine=transformers.")
    rank = int(json.loads(told.read_text(encoding="utf-8"))["r"])
    if rank > _RANKS[-1]:
        raise UserError(f"{name} in {folder} has rank {rank}, and vLLM takes {_RANKS[-1]} at most: lower arm.lora.r.")
    return next(size for size in _RANKS if size >= rank)
