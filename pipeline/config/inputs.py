"""The section `inputs` of params.yaml: files outside the stages' own outputs that DVC has to watch, per stage.

DVC's templates look a path up by a fixed key only, so what follows from several options (the folder of whatever model
`base` names) is worked out where conf/ is composed: `inputs: ${inputs:}` in conf/config.yaml. Hydra and DVC import
`hydra_plugins/`, which registers the resolver.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf

SECTIONS = ("fetch", "models", "objectives", "judge")  # what the section follows from
# A dependency that the stage has anyway, where an entry names no file of its own: DVC needs a path that is there.
_NONE = {stage: f"pipeline/stages/{stage}.py" for stage in ("fetch", "train", "judge")}


def inputs_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section that belongs to a composed configuration.

    Names that no model carries are left to `load.to_params`, which refuses them.

    Args:
        config: the sections of params.yaml, resolved.

    Returns:
        `fetch` and `train`: per model and objective, the arguments of the command and the paths that it reads.
        `judge`: the folder and options of a model of `models` that judges, and where digests of reward models are.
        `identify`: per objective, the folder of a reward model that is not among the outputs of the project.
    """
    models, judge = config.get("models") or {}, config.get("judge") or {}
    fetch = {}
    for name in config.get("fetch") or []:
        spec = models.get(name) or {}
        healing = spec.get("healing") or {}
        fetch[name] = {
            "arguments": {"model": name},
            "source": _folder(spec) or _NONE["fetch"],
            "prompts": healing.get("prompts") or _NONE["fetch"],
            # A sibling is healed on text that its parent writes, which is decoding; what is only fetched is not.
            "device": "decoding.device" if healing else f"models.{name}",
            "engine": "decoding.engine" if healing else f"models.{name}",
        }
    train = {
        name: {
            "arguments": {"objective": name},
            "pretrained": _folder((objective or {}).get("pretrained") or {}) or _NONE["train"],
        }
        for name, objective in (config.get("objectives") or {}).items()
    }
    local = judge.get("model") if judge.get("kind") == "local_llm" else None
    rewards = judge.get("models") or {} if judge.get("kind") == "reward_model" else {}
    folders = {name: _folder(spec or {}) for name, spec in rewards.items() if name in train}
    identify = {
        name: {"arguments": {"objective": name}, "folder": folder}
        for name, folder in folders.items()
        if folder and PurePath(folder).parts[:2] != ("models", "arms")  # which the stages depend on as it is
    }
    return {
        "fetch": fetch,
        "train": train,
        "judge": {
            "model": f"models/{local}" if local else _NONE["judge"],
            "options": f"models.{local}" if local else "judge",
            "digests": "results/identify" if identify else _NONE["judge"],
        },
        "identify": identify,
    }


def _folder(spec: Mapping[str, Any]) -> str | None:
    """Where a model is, if it is a folder on this machine."""
    return str(spec["location"]) if spec.get("source") == "path" and spec.get("location") else None


def _resolve(*, _root_: DictConfig) -> DictConfig:
    present = [section for section in SECTIONS if section in _root_]
    sections = {section: OmegaConf.to_container(_root_[section], resolve=True) for section in present}
    return OmegaConf.create(inputs_of(sections))


OmegaConf.register_new_resolver("inputs", _resolve, replace=True)
