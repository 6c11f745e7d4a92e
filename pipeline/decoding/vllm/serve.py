"""The process of vLLM's own OpenAI-compatible server, with our processor, scheduler and routes in it."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from pathlib import Path
from typing import Any, NoReturn

from pipeline.decoding.backbone import plan_backbones
from pipeline.decoding.vllm import guides
from pipeline.decoding.vllm.settings import SERVE, ends_and_marks, environment, settings, version_of
from pipeline.models.loading import Source
from pipeline.models.prompting import Prompter

_PLUGINS = ("genarm_cpu", "genarm_server")  # entry points of ours in pyproject.toml


def command(name: str, base: Source, adapters: Mapping[str, Path], engine: Mapping[str, Any], port: int) -> list[str]:
    """What starts vLLM's server: `engine` are its settings, `adapters` folders that nobody writes to any more."""
    arguments = {"served_model_name": name, "host": "127.0.0.1", "port": port, **engine}
    # Its other compilers take what this one does not know, and for some of that all memory there is.
    arguments["structured_outputs_config"] = {"backend": "xgrammar"}
    if adapters:
        arguments["lora_modules"] = [f"{arm}={folder}" for arm, folder in adapters.items()]
    if base.template is not None:
        arguments["chat_template"] = _chat_template(base.prompter())
    flags = [flag for name, value in arguments.items() for flag in _flag(name, value)]
    return [sys.executable, "-m", "pipeline.decoding.vllm.run", *flags]


def _chat_template(prompter: Prompter) -> str:
    """A template with room for one turn, as vLLM wants it: with the special tokens that begin a text."""
    before, after = str(prompter.template).split("{prompt}", 1)
    first = str(prompter.tokenizer.decode(prompter.control.around[0]))
    first = "" if before.startswith(first) else first
    several = "{% if messages | length > 1 %}{{ raise_exception('this model is asked one message') }}{% endif %}"
    pieces = json.dumps(first + before), "messages[0]['content']", json.dumps(after)
    return several + "".join(f"{{{{ {piece} }}}}" for piece in pieces)


def _flag(name: str, value: Any) -> list[str]:
    """An argument of the engine as vLLM's command line spells it."""
    spelled = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{spelled}" if value else f"--no-{spelled}"]
    if isinstance(value, dict):
        return [f"--{spelled}", json.dumps(value)]
    return [f"--{spelled}", *map(str, value if isinstance(value, list) else [value])]


def become_server(
    name: str, base: Source, arms: Mapping[str, Path], arm_base: Source | None, versions: Path, groups: int, port: int,
    more: Sequence[str],
) -> NoReturn:  # fmt: skip
    """Replace this process by vLLM's server.

    Args:
        name: of the base, as requests name it.
        base: the model that is steered.
        arms: folders of the ARMs, by objective.
        arm_base: what the ARMs were made from, where that is another model.
        versions: where copies of adapters are kept, which the engine reads.
        groups: guided requests at once.
        port: where it listens, on loopback.
        more: further flags of vLLM's server.

    Raises:
        UserError: an adapter is not one that vLLM can serve.
    """
    adapters, beside = plan_backbones(base, arms, arm_base, {}, reference=arm_base is not None)
    ends, marks = ends_and_marks(base)
    os.environ |= environment()
    engine = settings(base, adapters, beside, groups)
    models = {
        "base": name, "folder": str(base.folder), "groups": groups,
        "guides": guides.to_json(beside), "ends": ends, "marks": marks, "template": base.template,
        "adapters": {arm: str(folder.absolute()) for arm, folder in adapters.items()}, "versions": str(versions),
        "rank": engine.get("max_lora_rank", 0),
    }  # fmt: skip
    plugins = [plugin for plugin in os.environ.get("VLLM_PLUGINS", "").split(",") if plugin]
    os.environ |= {SERVE: json.dumps(models), "VLLM_PLUGINS": ",".join([*plugins, *_PLUGINS])}
    if allocator := find_library("tcmalloc_minimal"):  # as vLLM advises on CPUs: glibc's keeps what others give back
        os.environ.setdefault("LD_PRELOAD", allocator)
    adapters = {arm: version_of(arm, folder, versions) for arm, folder in adapters.items()}
    started = command(name, base, adapters, engine, port)
    os.execvp(started[0], [*started, *more])
