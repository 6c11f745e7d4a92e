"""vLLM's server as `serve` starts it: as a module, since the CPU build's `vllm` command does not know its version."""

import sys

_ENGINE_DIED = 70  # EX_SOFTWARE of sysexits.h: a supervisor restarts what ends with it


def main() -> None:
    """Run vLLM's server.

    Raises:
        SystemExit: it did not start, or its engine died, where vLLM itself would end as if all were well.
    """
    try:
        from vllm.entrypoints.launchers.api_server import entry

        from pipeline.decoding.vllm.server import deaths
    except ImportError as error:
        raise SystemExit(f"this version of vLLM has other interfaces ({error}): `make vllm`.") from error
    try:
        entry.main()
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"vLLM's server did not start: {error}") from error
    if deaths:
        print("vLLM's engine died, its own report is above: the server has to be started again.", file=sys.stderr)
        raise SystemExit(_ENGINE_DIED)


if __name__ == "__main__":
    main()
