"""From params.yaml to one frozen, typed `Params`; unknown keys, wrong types and contradictions stop here.

Hydra composes conf/ into params.yaml (`make params`); everything below the command line sees only the dataclasses of
`params` and the folders of a `Workspace`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from pipeline.config.errors import UserError
from pipeline.config.inputs import ALL, inputs_of
from pipeline.config.judges import Annotator, Judge, LocalJudge, RewardJudge
from pipeline.config.methods import Comparison, Method
from pipeline.config.schema import Objective, Params
from pipeline.config.values import Column

# What DVC reads of params.yaml by itself: it fails where a key is missing, though a default stands in `params`.
READ_BY_DVC = (
    "arm.base", "arm.kind", "arm.tuning", "comparison.bases", "comparison.name", "data.download", "data.path",
    "data.prompts", "data.sampler", "decoding.device", "decoding.engine", "decoding.max_new_tokens",
    "decoding.temperature", "judge.confidence", "judge.resamples", "objectives.*.beta", "objectives.*.pretrained",
    "sweep.control", "tune.bases", "tune.rivals", "weak_to_strong.name", "weak_to_strong.weak",
)  # fmt: skip
# Columns of the tables that scores stand in under their objectives' names, and `base`, the lane of the base.
COLUMNS = (
    "accepted", "base", "drafted", "forwards", "finish", "kl", "left_out", "line", "logp", "logp_base", "method",
    "n_tokens", "point", "prompt", "prompt_tokens", "response", "sample", "seed", "stream", "tokens",
)  # fmt: skip
_SECRET = re.compile(r"://[^/\s?#]*@|://\S*[?&][\w.-]*(key|token|secret|signature|sig|password)=", re.IGNORECASE)
_STAGES = (
    "bench", "comparison", "download", "explain", "fetch", "generate", "judge", "pareto", "prepare", "report", "train",
    "tune", "weak_to_strong",
)  # fmt: skip


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml.

    Raises:
        UserError: the file is missing, unreadable, or says something `to_params` refuses.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: write it with `make params`, in the project's folder.")
    try:
        config = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"{path} is not readable YAML ({error}): write it anew with `make params`.") from error
    return to_params(config, str(path))


def to_params(config: Any, origin: str = "the configuration") -> Params:
    """Turn a composed configuration into `Params`; no type is converted silently.

    Raises:
        UserError: an unknown key (the closest known one is named), a wrong type, a missing value, or values that
            contradict each other.
    """
    if not isinstance(config, DictConfig):
        raise UserError(f"{origin} is not a mapping of sections: write it anew with `make params`.")
    if missing := _missing(OmegaConf.to_container(config, resolve=False)):
        raise UserError(f"{origin}: {missing[0]} has no value: give it one, as in {missing[0]}=value.")
    try:
        plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {str(error).splitlines()[0]}: correct the reference.") from error
    inputs = plain.pop("inputs", None)
    if secrets := _secrets(plain):  # first: the sentences below show values
        raise UserError(
            f"{origin}: {secrets[0]} is an address that holds a password or key: take it out of the configuration and "
            f"of {origin}, and export an endpoint's key in the variable that judge.api_key_env names."
        )
    try:
        params = TypeAdapter(Params).validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        # An unknown key first: it is often why another one is missing.
        faults = sorted(error.errors(), key=lambda fault: fault["type"] != "unexpected_keyword_argument")
        raise UserError(f"{origin}: {_sentence(faults[0])}") from None
    for path in READ_BY_DVC:
        for absent in _absent(plain, path.split(".")):
            raise UserError(f"{origin}: {absent} is missing, and DVC reads it: give it a value.")
    _check(params, origin)
    if inputs != inputs_of(plain):  # else DVC would watch the files of another model
        raise UserError(f"{origin}: inputs does not follow from the other sections: write it anew with `make params`.")
    return params


def _missing(node: Any, path: str = "") -> list[str]:
    """Paths of the values that are still `???`."""
    if isinstance(node, dict):
        return [missing for key, value in node.items() for missing in _missing(value, f"{path}.{key}".lstrip("."))]
    return [path] if node == "???" else []


def _secrets(node: Any, path: str = "") -> list[str]:
    """Paths of the texts with an address that holds a user's name, a password or a key."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return [secret for key, value in items for secret in _secrets(value, f"{path}.{key}".lstrip("."))]
    return [path] if isinstance(node, str) and _SECRET.search(node) else []


def _absent(node: Any, path: list[str], parents: str = "") -> list[str]:
    """Which keys a path names that are not there; `*` stands for every key."""
    if not path:
        return []
    keys = list(node) if path[0] == "*" else [path[0]]
    if path[0] != "*" and path[0] not in node:
        return [f"{parents}{path[0]}"]
    return [absent for key in keys for absent in _absent(node[key], path[1:], f"{parents}{key}.")]


def _sentence(fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    reason = fault["msg"].removeprefix("Value error, ")
    if path[-1] == "[key]":
        return f"{'.'.join(path[:-2])} names {fault['input']!r}: {reason}."
    below = path[:2] == ["comparison", "methods"] or path[2:3] == ["annotator"]
    tag = 3 if below else 1 if path[0] == "judge" else len(path)
    kind, path = path[tag : tag + 1], [*path[:tag], *path[tag + 1 :]]  # of several kinds pydantic names the one as well
    where = ".".join(path)
    if fault["type"] == "unexpected_keyword_argument":
        close = get_close_matches(path[-1], _known_keys(path[:-1], kind), n=1, cutoff=0.0)
        return f"unknown key {where}: did you mean {'.'.join([*path[:-1], *close])}?"
    if fault["type"] == "missing":
        return f"{where} is missing: give it a value."
    return f"{where} is {fault['input']!r}: {reason[0].lower()}{reason[1:]}."


def _known_keys(path: list[str], name: list[str]) -> list[str]:
    """The fields of the dataclass at a path such as `sweep.points.base`; `name` its kind, if there are several."""
    kind: Any = Params
    for part in path:
        if get_origin(kind) is dict:  # the part is the name of an entry, such as a point's
            kind = get_args(kind)[1]
            continue
        kind = get_type_hints(kind, include_extras=kind is Comparison or part in ("judge", "annotator"))[part]
        kind = get_args(kind)[0] if part == "annotator" else kind  # which may be None as well
        kind = next(
            (option for option in get_args(kind) if is_dataclass(option) and get_origin(kind) is not dict), kind
        )
    kinds = get_args(get_args(kind)[0]) if kind in (Method, Judge, Annotator) else [kind]
    kinds = [one for one in kinds if len(kinds) == 1 or name[0] in get_args(get_type_hints(one)["kind"])]
    return [known.name for one in kinds for known in fields(one)]


def _check(params: Params, origin: str) -> None:
    """Refuse values that only contradict each other when seen together."""
    points, objectives = params.sweep.points, params.objectives
    named = {"base": params.base, "arm.base": params.arm.base, "data.sampler": params.data.sampler}
    lists = {
        "weak_to_strong.bases": params.weak_to_strong.bases,
        "tune.bases": params.tune.bases,
        "fetch": params.fetch,
    }
    for key, listed in lists.items():
        named |= {f"{key}[{number}]": name for number, name in enumerate(listed)}
    for key, name in named.items():
        if name not in params.models:
            close = get_close_matches(name, params.models, n=1, cutoff=0.0)
            raise UserError(f"{origin}: {key} {name} is no model: did you mean {close[0]}?")
        if name not in params.fetch:
            raise UserError(f"{origin}: {key} {name} is not among the models that fetch lists: add it there.")
    for name, spec in params.models.items():
        if (spec.source == "distilled") != (spec.distillation is not None):
            raise UserError(f"{origin}: models.{name}: source distilled and distillation belong together: set both.")
        if name in params.fetch and spec.source == "distilled" and spec.location not in params.fetch:
            raise UserError(
                f"{origin}: models.{name} is distilled from {spec.location}, which is not among the models that fetch "
                "lists: add it there."
            )
    for name in ("arms", "rivals"):
        if name in params.models:
            raise UserError(f"{origin}: no model can be called {name}: that is a folder's name.")
    for name in objectives.keys() & set(COLUMNS):
        raise UserError(f"{origin}: an objective cannot be called {name}, as a column of the tables is: rename it.")
    _check_labels(objectives, origin)
    for section, own in (("weak_to_strong", params.weak_to_strong.name), ("comparison", params.comparison.name)):
        other = params.comparison.name if section == "weak_to_strong" else params.weak_to_strong.name
        if own != section and own in (*_STAGES, other):
            raise UserError(f"{origin}: {section}.name {own} is another stage's folder: rename it.")
    if params.weak_to_strong.weak not in ((), (params.arm.base,)):
        raise UserError(f"{origin}: weak_to_strong.weak must be the ARM's model: set it to [{params.arm.base}].")
    if isinstance(params.judge, LocalJudge) and params.judge.model not in params.fetch:
        raise UserError(f"{origin}: judge.model {params.judge.model} is not among the models that fetch lists: add it.")
    compared = params.comparison
    if compared.bases not in ((), (params.base,)):
        raise UserError(f"{origin}: comparison.bases must be the base: set it to [{params.base}].")
    if compared.bases and compared.against not in compared.methods:
        raise UserError(
            f"{origin}: comparison.against {compared.against} is no method: name one of {', '.join(compared.methods)}."
        )
    if params.sweep.control not in points:
        raise UserError(f"{origin}: sweep.control {params.sweep.control} is no point: name one of {', '.join(points)}.")
    weighted = {f"sweep.points.{name}": point.weights for name, point in points.items()}
    weighted |= {f"tune.rivals.{name}": rival.weights for name, rival in params.tune.rivals.items()}
    for key, weights in weighted.items():
        for unknown in weights.keys() - objectives.keys():
            close = get_close_matches(unknown, objectives, n=1, cutoff=0.0)
            raise UserError(f"{origin}: {key}.weights names {unknown}, which is no objective: did you mean {close[0]}?")
    for name, point in points.items():
        if point.form != "plain" and not point.guided:
            raise UserError(f"{origin}: sweep.points.{name} has a form but no weights: give it some.")
    for name, point in points.items():
        if point.form != "log_ratio" and (below := [key for key, weight in point.weights.items() if weight < 0]):
            raise UserError(
                f"{origin}: sweep.points.{name}.weights.{below[0]} is negative, which would divide by a whole language "
                f"model: set sweep.points.{name}.form=log_ratio."
            )
    for name in objectives:
        _check_source(name, params, origin)
    if params.loss.kind == "hinge" and params.loss.label_smoothing:
        raise UserError(f"{origin}: the hinge loss knows no label smoothing: set loss.label_smoothing=0.0.")
    if params.arm.for_all_mixes:
        _check_for_all_mixes(params, origin)
    if params.arm.tuning == "full" and params.arm.quantisation is not None:
        raise UserError(f"{origin}: a quantised base cannot be trained whole: set arm.quantisation=null or arm=lora.")
    if params.arm.quantisation is not None and params.trainer.strategy == "fsdp":
        raise UserError(f"{origin}: a quantised base cannot be sharded: use arm=lora, or trainer=ddp.")
    folders = [one.folder for one in params.data.download]
    if folders and not any(Path(params.data.path).is_relative_to(folder) for folder in folders):
        raise UserError(
            f"{origin}: data.path is {params.data.path}, but data.download fills {', '.join(folders)} anew: set "
            "data.download=[] to read files of your own."
        )
    if params.decoding.engine == "vllm" and params.decoding.num_speculative_tokens:
        raise UserError(
            f"{origin}: decoding.num_speculative_tokens is {params.decoding.num_speculative_tokens}, and guided "
            "requests are not drafted inside vLLM: set it to null, or decoding.engine=transformers."
        )
    if params.data.validation_fraction + params.data.test_fraction >= 1:
        raise UserError(f"{origin}: data.validation_fraction and data.test_fraction leave nothing to train on.")


def _check_for_all_mixes(params: Params, origin: str) -> None:
    """Refuse what an ARM for all mixes cannot be, or cannot be used for."""
    subject, objectives = f"{origin}: arm.kind {params.arm.kind} is one ARM for all mixes", params.objectives
    if len(objectives) < 2:
        raise UserError(f"{subject}, and there is one objective: set arm.kind=separate.")
    if params.arm.tuning == "full":
        raise UserError(f"{subject}, an adapter: set arm.tuning=lora.")
    if params.arm.rank < 2:
        raise UserError(f"{subject}, which conditions its ranks: set arm.rank to 2 or more.")
    if params.trainer.strategy == "fsdp":
        raise UserError(f"{subject}, which cannot be sharded: use trainer=ddp.")
    if given := [name for name, objective in objectives.items() if objective.pretrained is not None]:
        raise UserError(f"{subject}, trained here: set objectives.{given[0]}.pretrained=null, or arm.kind=separate.")
    if ALL in objectives:
        raise UserError(f"{subject}, whose training is called {ALL}: call the objective {ALL} otherwise.")
    if params.comparison.bases or params.weak_to_strong.methods:
        section = "comparison" if params.comparison.bases else "weak_to_strong.methods"
        raise UserError(f"{subject}, and {section} compares with separate ones: set arm.kind=separate.")


def _check_source(name: str, params: Params, origin: str) -> None:
    """Refuse an objective whose preferences come from nowhere, or from two places."""
    objective, sampled = params.objectives[name], params.data.sampling is not None
    key, source = f"{origin}: objectives.{name}", objective.source(params.data)
    if source == "scorer" and objective.scorer is None:
        raise UserError(
            f"{key} has no scorer to label samples: set objectives.{name}.scorer, or two sentences, "
            f"objectives.{name}.wanted and objectives.{name}.unwanted."
        )
    sampling = params.data.sampling
    if source != "contrast" and sampling is not None and sampling.responses_per_prompt < 2:
        raise UserError(
            f"{key} compares responses to one prompt, and data.sampling.responses_per_prompt is "
            f"{sampling.responses_per_prompt}: set it to 2 or more."
        )
    if objective.unwanted is not None and objective.wanted is None:
        raise UserError(f"{key}.unwanted stands alone: set objectives.{name}.wanted, or unwanted=null.")
    if objective.wanted is not None and objective.annotator is not None:
        raise UserError(f"{key} has both a sentence and an annotator: set one of wanted and annotator to null.")
    if source in ("contrast", "judge", "reward_model") and not sampled:
        chosen = "wanted" if source == "contrast" else "annotator"
        raise UserError(f"{key}.{chosen} needs sampled responses: set data.sampling, as data=everyday does.")
    wanted, unwanted = (" ".join((text or "").lower().split()) for text in (objective.wanted, objective.unwanted))
    if wanted and wanted == unwanted:
        raise UserError(f"{key}.wanted and .unwanted are the same sentence: change one of them.")
    if objective.annotator is None:
        return
    is_reward = isinstance(objective.annotator, RewardJudge)
    named = objective.annotator.models if isinstance(objective.annotator, RewardJudge) else objective.annotator.rubrics
    if name not in named:
        part = "models" if is_reward else "rubrics"
        raise UserError(f"{key}.annotator.{part} has none for {name}: add objectives.{name}.annotator.{part}.{name}.")
    if isinstance(objective.annotator, LocalJudge) and objective.annotator.model not in params.fetch:
        raise UserError(f"{key}.annotator.model is not among the models that fetch lists: add it.")


def _check_labels(objectives: Mapping[str, Objective], origin: str) -> None:
    """Every objective has a label column of its own, beside those that rows have anyway."""
    owners: dict[str, str] = {}
    for name, objective in objectives.items():
        if objective.label in get_args(Column):
            raise UserError(
                f"{origin}: objectives.{name}.label is {objective.label}, a column that rows have anyway: name another."
            )
        if (other := owners.setdefault(objective.label, name)) != name:
            raise UserError(
                f"{origin}: objectives {other} and {name} have one label column, {objective.label}, so one would be "
                "trained on the other's labels: give each its own."
            )
