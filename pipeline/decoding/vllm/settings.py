"""How vLLM has to be started for lanes: the same for the decoder and for the server."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from pipeline.config.errors import UserError
from pipeline.data.files import replacing_folder
from pipeline.decoding.backbone import SideBackbone
from pipeline.decoding.fused_lora import read_adapter
from pipeline.decoding.vllm.guides import to_json
from pipeline.models.identity import folder_identity
from pipeline.models.loading import Source, resolve_device, resolve_dtype
from pipeline.models.mixtures import mixtures_of
from pipeline.models.prompting import Prompter, ends_of
from pipeline.models.vocabulary import check_adapter_tokenizer, check_vocabulary

EXTRA = "guidance"  # the key of a lane's facts in `SamplingParams.extra_args`, and of ours in `additional_config`
SERVE = "GENARM_SERVE"  # environment variable: the models that the launcher serves, as JSON, for the server's routes
SCHEDULER = "pipeline.decoding.vllm.scheduler.GroupScheduler"
TESTED = ("0.32",)  # of vLLM; its interfaces have changed between minor versions
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_PROCESSORS = {
    "0": "pipeline.decoding.vllm.runner_v1:LaneProcessorV1",
    "1": "pipeline.decoding.vllm.runner_v2:LaneProcessorV2",
}
_MARKS = 66  # two more than a client can name in stop_token_ids
_MIXES = 8  # mixtures of adapters that are drawn from at once; further ones wait
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's buffers for adapters come in


def environment() -> dict[str, str]:
    """vLLM's environment variables, which have to be set before it is imported; what the user has set stays."""
    runner = "1" if resolve_device("auto").type == "cuda" else "0"
    return {
        "VLLM_NO_USAGE_STATS": "1",
        # In GiB; vLLM's own choice is nearly all memory there is.
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "4"),
        # vLLM chooses between its model runners by what it finds, and each takes processors of one kind only. The
        # second needs Triton, whose wheels have no backend for CPUs.
        _RUNNER: os.environ.get(_RUNNER, runner),
    }


def settings(base: Source, adapters: Mapping[str, Path], beside: Sequence[SideBackbone], groups: int) -> dict[str, Any]:
    """Arguments of vLLM's engine, by name, for so many guided requests at once.

    Args:
        base: the base.
        adapters: what runs on it, as lanes.
        beside: what runs next to it, as guides.
        groups: guided requests at once.

    Raises:
        UserError: vLLM is not there; an adapter is missing, or of a higher rank than vLLM has
            buffers for; a guide has another tokenizer; int8, which vLLM does not do.
    """
    _check_version()
    prompter = base.prompter()
    for side in beside:
        check_vocabulary(prompter.tokenizer, side.source.prompter().tokenizer, ", ".join(side.names))
    if base.quantisation == "int8":
        raise UserError("vLLM does not quantise to int8 on loading: set the base's quantisation to nf4 or null.")
    arguments: dict[str, Any] = {
        "model": str(base.folder), "dtype": _dtype(base), "max_num_seqs": groups * (1 + len(adapters)),
        "enable_chunked_prefill": True, "async_scheduling": False, "enforce_eager": True,
        "logits_processors": [_PROCESSORS[os.environ[_RUNNER]]],
        "worker_extension_cls": "pipeline.decoding.vllm.processor.Ledger",
        "scheduler_cls": SCHEDULER,
        "additional_config": {EXTRA: {"vocab_size": prompter.vocab_size, "guides": to_json(beside)}},
    }  # fmt: skip
    if base.quantisation == "nf4":
        arguments["quantization"] = "bitsandbytes"
    if adapters:
        check_adapters(prompter, base, adapters)
        # One slot more than adapters: on CPUs rows without an adapter read the last slot, which has to be empty.
        rank = max(rank_of(name, folder) for name, folder in adapters.items())
        slots = len(adapters) + 1 + (min(groups, _MIXES) if mixtures_of(adapters) else 0)
        arguments |= {"enable_lora": True, "max_loras": slots, "max_lora_rank": rank}
    return arguments


def _dtype(base: Source) -> str:
    """The decoder's own choice on CPUs: `auto` of vLLM is bfloat16 there too where no kernel multiplies in it."""
    device = resolve_device("auto")
    return base.dtype if device.type == "cuda" else str(resolve_dtype(base.dtype, device)).removeprefix("torch.")


def _check_version() -> None:
    """Warn of versions that were not tested: what breaks there, breaks when vLLM starts."""
    versions = [distribution.version for distribution in distributions() if distribution.name in ("vllm", "vllm-cpu")]
    if not versions:
        raise UserError("vLLM is not installed: `make vllm`.")
    if not versions[0].startswith(tuple(f"{version}." for version in TESTED)):
        warnings.warn(
            f"vLLM is {versions[0]}, and tested are {', '.join(f'{version}.x' for version in TESTED)}: if it does not "
            "start, its logits processors, scheduler or request classes have other interfaces; `make vllm` installs a "
            "tested version.",
            stacklevel=2,
        )


def ends_and_marks(base: Source) -> tuple[list[int], list[int]]:
    """The tokens that end a response, and tokens that don't, to mark lanes of groups that are not whole."""
    config = base.folder / "generation_config.json"
    prompter = base.prompter()
    ends = ends_of(prompter, GenerationConfig.from_pretrained(base.folder) if config.is_file() else None)
    return sorted(ends), [token for token in range(prompter.vocab_size) if token not in ends][-_MARKS:]


def check_adapters(prompter: Prompter, base: Source, adapters: Mapping[str, Path]) -> None:
    """Refuse what `GuidedDecoder` refuses: vLLM would load some of it, and apply something else.

    Raises:
        UserError: an adapter is missing, damaged, not made for the base, or has another tokenizer.
    """
    with torch.device("meta"):  # its layers' names and shapes, and no weights
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False),
            trust_remote_code=False,
        )
    for name, folder in adapters.items():
        if any(update.constant_R is not None for update in read_adapter(folder, model).values()):
            raise UserError(f"{folder} has biases, which vLLM leaves out: use decoding.engine=transformers.")
        check_adapter_tokenizer(prompter, folder, name)


def rank_of(name: str, folder: Path) -> int:
    """The least of vLLM's ranks that has room for an adapter."""
    rank = int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    if rank > _RANKS[-1]:
        raise UserError(f"{name} in {folder} has rank {rank}, and vLLM takes {_RANKS[-1]} at most: lower arm.lora.r.")
    return next(size for size in _RANKS if size >= rank)


def version_of(name: str, folder: Path, versions: Path) -> Path:
    """The copy of an ARM's folder as it is now; it is made unless it is there.

    Args:
        name: of the ARM.
        folder: the ARM's, where training writes.
        versions: where copies are.

    Raises:
        UserError: training wrote to it meanwhile.
    """
    identity = folder_identity(folder)
    copy = versions.absolute() / f"{name}-{identity}"
    if not copy.is_dir():
        with replacing_folder(copy) as unfinished:
            shutil.copytree(folder, unfinished, dirs_exist_ok=True)
            if folder_identity(unfinished) != identity:
                raise UserError(f"{folder} was written to while it was read: try again once training has ended.")
    return copy
