"""The section `inputs` of params.yaml: files outside the stages' own outputs that DVC has to watch, per stage.

DVC's templates look a path up by a fixed key only, so what follows from several options (the folder of whatever model
`base` names) is worked out where conf/ is composed: `inputs: ${inputs:}` in conf/config.yaml. Hydra and DVC import
`hydra_plugins/`, which registers the resolver.
"""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

SECTIONS = ("arm", "fetch", "models", "objectives", "judge", "sweep", "tune")  # what the section follows from
ALL = "all"  # the name of the training that makes one ARM for all mixes
# A dependency that the stage has anyway, where an entry names no file of its own: DVC needs a path that is there.
_STAGES = ("fetch", "distil", "prepare", "train", "generate", "explain", "judge", "weak_to_strong", "comparison")
_NONE = {stage: f"pipeline/stages/{stage}.py" for stage in _STAGES}


def inputs_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section that belongs to a composed configuration.

    Names that no model carries are left to `load.to_params`, which refuses them.

    Args:
        config: the sections of params.yaml, resolved.

    Returns:
        `fetch`, `distil` and `train`: per model and objective, the arguments of the command, what it reads and writes.
        `judge`: the folder and options of a model of `models` that judges, and where digests of reward models are.
        `prepare`: where digests of the models that label are.
        `generate`, `explain`, `weak_to_strong`, `comparison`: where rivals are, for a sweep that asks DPO policies, and
        for a comparison that trains some.
        `identify`: per role and objective, the folder of a model whose digest is written there.
    """
    models, judge = config.get("models") or {}, config.get("judge") or {}
    objectives = config.get("objectives") or {}
    fetch, distil = {}, {}
    for name in config.get("fetch") or []:
        spec = models.get(name) or {}
        if spec.get("source") == "distilled":
            prompts = (spec.get("distillation") or {}).get("prompts") or _NONE["distil"]
            distil[name] = {"arguments": {"model": name}, "parent": spec.get("location"), "prompts": prompts}
        else:
            fetch[name] = {"arguments": {"model": name}, "source": _folder(spec) or _NONE["fetch"]}
    local = judge.get("model") if judge.get("kind") == "local_llm" else None
    annotators = {name: (objective or {}).get("annotator") for name, objective in objectives.items()}
    identify = {
        **_identified("judge", dict.fromkeys(objectives, judge)),
        **_identified("annotator", annotators),
    }
    roles = {entry["arguments"]["role"] for entry in identify.values()}
    points = (config.get("sweep") or {}).get("points") or {}
    asks_policies = any((point or {}).get("form") == "dpo" for point in points.values())
    tuned = bool((config.get("tune") or {}).get("bases"))
    return {
        "fetch": fetch,
        "distil": distil,
        "train": _trained(config.get("arm") or {}, objectives),
        "prepare": {"digests": "results/identify/annotator" if "annotator" in roles else _NONE["prepare"]},
        "judge": {
            "model": f"models/{local}" if local else _NONE["judge"],
            "options": f"models.{local}" if local else "judge",
            "digests": "results/identify/judge" if "judge" in roles else _NONE["judge"],
        },
        "identify": identify,
        **{
            stage: {"rivals": "models/rivals" if asks_policies else _NONE[stage]}
            for stage in ("generate", "explain", "weak_to_strong")
        },
        "comparison": {
            "rivals": "models/rivals" if tuned else _NONE["comparison"],
            "tuned": "results/tune" if tuned else _NONE["comparison"],
        },
    }


def _trained(arm: Mapping[str, Any], objectives: Mapping[str, Any]) -> dict[str, Any]:
    """The trainings of ARMs: one for each objective, or one for all of them."""
    if arm.get("kind", "separate") != "separate":
        return {
            ALL: {
                "arguments": {"objective": ALL}, "pretrained": _NONE["train"], "pairs": "results/prepare/pairs",
                "folder": "models/arms", "beta": "objectives", "origin": "objectives",
            }
        }  # fmt: skip
    return {
        name: {
            "arguments": {"objective": name},
            "pretrained": _folder((objective or {}).get("pretrained") or {}) or _NONE["train"],
            "pairs": f"results/prepare/pairs/{name}.jsonl",
            "folder": f"models/arms/{name}",
            "beta": f"objectives.{name}.beta",
            "origin": f"objectives.{name}.pretrained",
        }
        for name, objective in objectives.items()
    }


def _identified(role: str, judges: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """The entries of models that stages cannot depend on by a path of their own, since any number may be named.

    These are the reward models of judges and annotators that lie on this machine, and the models of annotators that
    are fetched.
    """
    entries = {}
    for name, judge in judges.items():
        section = "judge" if role == "judge" else f"objectives.{name}.annotator"
        folder, option = None, ""
        if judge and judge.get("kind") == "reward_model":
            folder, option = _folder((judge.get("models") or {}).get(name) or {}), f"{section}.models.{name}.location"
        elif judge and judge.get("kind") == "local_llm" and role == "annotator":
            folder, option = f"models/{judge.get('model')}", f"{section}.model"
        if folder:
            arguments = {"role": role, "objective": name}
            entries[f"{role}-{name}"] = {"arguments": arguments, "folder": folder, "option": option}
    return entries


def _folder(spec: Mapping[str, Any]) -> str | None:
    """Where a model is, if it is a folder on this machine."""
    return str(spec["location"]) if spec.get("source") == "path" and spec.get("location") else None


def _resolve(*, _root_: DictConfig) -> DictConfig:
    present = [section for section in SECTIONS if section in _root_]
    sections = {section: OmegaConf.to_container(_root_[section], resolve=True) for section in present}
    return OmegaConf.create(inputs_of(sections))


OmegaConf.register_new_resolver("inputs", _resolve, replace=True)
