"""Dials made from two sentences: which there are, and what an experiment is that makes one."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import TypeAdapter

from pipeline.config.load import to_params
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace

_PROMPTS = Path(__file__).parents[1] / "data" / "prompts" / "everyday.jsonl"
_LIMITS: Mapping[Any, int] = {"train": 64, "validation": 8, "test": 16}  # prompts
_RESPONSES, _TOKENS = 2, 40  # under each sentence
# Of the length-normalised loss, which a sentence such as "Answer in one short sentence." does not solve by length.
_OBJECTIVE, _MARGIN, _LR = {"beta": 2.0, "pretrained": None}, 1.0, 5.0e-4


@dataclass(frozen=True)
class Dial:
    """A finished dial."""

    name: str
    wanted: str
    unwanted: str
    base: str  # the model whose adapter it is
    verdict: str  # of the data card
    accuracy: float | None  # on held-out pairs
    seconds: float
    arm: Path


def dials_folder(workspace: Workspace) -> Path:
    """Where dials are kept."""
    return workspace.scratch / "dials"


def finished_dials(workspace: Workspace) -> list[Dial]:
    """The dials that are there, oldest first."""
    files = sorted(dials_folder(workspace).glob("*/dial.json"), key=lambda file: file.stat().st_mtime)
    return [Dial(**json.loads(file.read_text(encoding="utf-8")), arm=file.parent / "arm") for file in files]


def dial_params(params: Params, name: str, wanted: str, unwanted: str) -> Params:
    """The experiment with that objective alone, on few prompts and with the length-normalised loss.

    Raises:
        UserError: the sentences are empty or equal, or the name cannot be one.
    """
    sampled = params.data.sampling is not None  # then the data are prompts
    path = params.data.path if sampled else str(_PROMPTS)
    base, limits = params.arm.base, params.data.limits
    tokens = min(_TOKENS, params.data.sampling.max_new_tokens) if params.data.sampling else _TOKENS
    changes: dict[str, Any] = {
        "fetch": [base],
        "base": base,
        "objectives": {name: {"label": f"preferred_{name}", "wanted": wanted, "unwanted": unwanted} | _OBJECTIVE},
        "data": {
            "path": path, "prompts": path, "sampler": base, "download": [],
            "limits": {split: min(most, limits.get(split, most)) for split, most in _LIMITS.items()},
            "sampling": {"responses_per_prompt": _RESPONSES, "max_new_tokens": tokens},
            "columns": dict(params.data.columns) if sampled else {},
        },
        "arm": asdict(params.arm) | {"kind": "separate"},
        "loss": {"kind": "simpo", "margin": _MARGIN},
        "trainer": asdict(params.trainer) | {"lr": _LR},
        "sweep": {"control": "base", "points": {"base": {}}},
        "tune": {"bases": [], "rivals": {}},
        "comparison": {"name": "comparison", "bases": [], "methods": {}},
        "weak_to_strong": {"name": "weak_to_strong", "weak": [], "bases": []},
        "judge": {"kind": "oracle"} | {key: getattr(params.judge, key) for key in ("confidence", "resamples")},
        "tracking": {"mode": "disabled"},
        "inputs": "${inputs:}",
    }  # fmt: skip
    config = OmegaConf.create(json.loads(TypeAdapter(Params).dump_json(params)) | changes)
    return to_params(config, "the dial")
