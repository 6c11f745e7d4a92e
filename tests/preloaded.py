"""A `dvc`, and a `python` for the stages that it starts, which begin with torch, transformers and Lightning loaded.

Importing these takes a stage of a tiny model several times as long as its work. One process imports them once; commands
named `dvc` and `python`, first on PATH, ask it to fork, and the fork runs `dvc ...` or `python -m pipeline ...` in the
folder, environment and files of whoever asked. Only libraries are loaded beforehand: the package is that of the folder.
`make test` uses it; without `--preload`, as in `make smoke`, every stage starts an interpreter of its own.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, invalidate_caches
from pathlib import Path

LIBRARIES = (
    "datasets", "dvc.cli", "dvc.repo", "hydra", "lightning.pytorch.loggers", "matplotlib.backends.backend_agg",
    "matplotlib.figure", "pandas", "peft", "scipy.optimize", "scipy.sparse", "textblob", "torch",
    "transformers.generation.utils", "transformers.modeling_utils", "transformers.models.llama.modeling_llama",
    "vaderSentiment.vaderSentiment", "wandb",
)  # fmt: skip
LONGEST = 1 << 17  # bytes of a request: arguments, folder and environment

# `python` goes past it with anything else. Isolated and without `site`, it starts in 20 milliseconds.
CLIENT = """\
#!{python} -IS
import json, os, socket, sys
called = sys.argv[0].endswith("dvc")
if not called and sys.argv[1:3] not in (["-m", "pipeline"], ["-m", "dvc"]):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
arguments = ["dvc", *sys.argv[1:]] if called else sys.argv[2:]
request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
    asked.connect({address!r})
    socket.send_fds(asked, [request], [0, 1, 2])
    sys.exit(int(asked.recv(8) or b"70"))
"""


@contextmanager
def preloaded_python(folder: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """The folder of these commands, to be put first on PATH.

    Args:
        folder: an empty one, with a short path (an address of 107 bytes at most).
        environment: what the libraries see while they are imported.
    """
    address = folder / "socket"
    for command in ("python", "dvc"):
        (folder / command).write_text(CLIENT.format(python=sys.executable, address=str(address)), encoding="utf-8")
        (folder / command).chmod(0o755)
    command = [sys.executable, "-P", __file__, str(address)]
    with subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE, cwd=folder) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n", "the libraries do not load"
            yield folder
        finally:
            server.terminate()


def _serve(address: str) -> list[str]:
    """Fork for every request; returns only in the forks, with what to run: a module and its arguments."""
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()  # what the forks share is not written to
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
        while True:
            asked, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                return _answer(asked)
            asked.close()


def _answer(asked: socket.socket) -> list[str]:
    """Fork once more, tell how that one ended, and end; returns in the fork, with what to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, files, _, _ = socket.recv_fds(asked, LONGEST, 3)
    if stage := os.fork():
        for file in files:
            os.close(file)
        code = os.waitstatus_to_exitcode(os.waitpid(stage, 0)[1])
        asked.send(str(code if code >= 0 else 128 - code).encode())
        os._exit(0)
    asked.close()
    arguments, folder, environment = json.loads(request)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return list(arguments)


def _run(module: str) -> int:
    """Run a module as `python -m` does; its exit status."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.executable = str(Path(sys.argv[1]).parent / "python")  # for what a stage starts in its turn
    sys.argv = _serve(sys.argv[1])
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    invalidate_caches()
    code = _run(sys.argv[0])
    # As an interpreter ends, but for taking all that was loaded apart, which lasts as long as a stage.
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
