"""Guided decoding behind vLLM's own OpenAI-compatible server.

    python -m pipeline serve --port 8000     # `make serve`; flags after -- go to vLLM's server
    curl -s localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "smollm2-135m",
      "messages": [{"role": "user", "content": "Describe a rainy Monday."}], "max_tokens": 48, "seed": 1,
      "guidance": {"weights": {"positivity": 1.0}}}'

The server is vLLM's with our processor, our scheduler and our routes, which turn a request with `guidance` into its
lanes; a request without it goes on to vLLM's own. `kill -HUP <process>` takes over ARMs that were trained again.
"""

import json
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace
from pipeline.decoding.backbone import plan_backbones
from pipeline.decoding.vllm import guides
from pipeline.decoding.vllm.settings import ENVIRONMENT, ROOM, SERVE, ends_and_marks, settings, version_of
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


def main(arguments: Sequence[str]) -> None:
    """Become vLLM's server for the base and the ARMs of params.yaml."""
    parser = ArgumentParser(
        "python -m pipeline serve", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--groups", type=int, default=32, help="guided requests at once")
    parser.add_argument("more", nargs="*", help="after --: further flags of vLLM's server")
    options = parser.parse_args(arguments)
    params, workspace = load_params(), Workspace()
    source = Source.of(params.models, workspace, params.base)
    weak = Source.of(params.models, workspace, params.arm.base) if params.arm.base != params.base else None
    arms = {name: workspace.arm(name) for name in params.objectives}
    adapters, beside = plan_backbones(source, arms, weak, {}, reference=weak is not None)
    ends, marks = ends_and_marks(source)
    engine = settings(source, adapters, beside, options.groups)
    versions = workspace.scratch.absolute() / "serve"
    models = {
        "base": params.base, "folder": str(source.folder), "groups": options.groups,
        "guides": guides.to_json(beside), "ends": ends, "marks": marks, "template": source.template,
        "adapters": {name: str(folder.absolute()) for name, folder in adapters.items()}, "versions": str(versions),
        "rank": engine.get("max_lora_rank", 0),
    }  # fmt: skip
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ |= {SERVE: json.dumps(models), **ENVIRONMENT, "VLLM_PLUGINS": ",".join([*plugins, *_PLUGINS])}
    os.environ.setdefault(*ROOM)
    if allocator := find_library("tcmalloc_minimal"):  # as vLLM advises on CPUs: glibc's keeps what others give back
        os.environ.setdefault("LD_PRELOAD", allocator)
    adapters = {name: version_of(name, folder, versions) for name, folder in adapters.items()}
    started = command(params.base, source, adapters, engine, options.port)
    os.execvp(started[0], [*started, *options.more])
