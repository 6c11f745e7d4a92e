"""Guided decoding behind vLLM's own OpenAI-compatible server.

    python -m pipeline serve --port 8000     # `make serve`; flags after -- go to vLLM's server
    curl -s localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "smollm2-135m",
      "messages": [{"role": "user", "content": "Describe a rainy Monday."}], "max_tokens": 48, "seed": 1,
      "guidance": {"weights": {"positivity": 1.0}}}'

The server is vLLM's with our processor, our scheduler and our routes, which turn a request with `guidance` into its
lanes; a request without it goes on to vLLM's own. `kill -HUP <process>` takes over ARMs that were trained again.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from pipeline.config.load import load_params
from pipeline.config.workspace import Workspace
from pipeline.decoding.vllm.serve import become_server
from pipeline.models.loading import Source


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
    base = Source.of(params.models, workspace, params.base)
    arm_base = Source.of(params.models, workspace, params.arm.base) if params.arm.base != params.base else None
    arms = {name: workspace.arm(name) for name in params.objectives}
    versions = workspace.scratch.absolute() / "serve"
    become_server(params.base, base, arms, arm_base, versions, options.groups, options.port, options.more)
