"""A `python` for the stages that DVC starts, which begins with torch, transformers and Lightning loaded.

Importing these takes a stage of a tiny model several times as long as its work. One process imports them once; a
command named `python`, first on PATH, asks it to fork, and the fork runs `python -m pipeline ...` in the folder,
environment and files of whoever asked. Only libraries are loaded beforehand: the package is that of the folder.
`make test` uses it; without `--preload`, as in `make smoke`, every stage starts an interpreter of its own.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, invalidate_caches
from pathlib import Path

LIBRARIES = (
    "datasets", "dvc.repo", "hydra", "lightning.pytorch.loggers", "matplotlib.figure", "pandas", "peft",
    "scipy.optimize", "scipy.sparse", "torch", "transformers.generation.utils", "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama", "wandb",
)  # fmt: skip
LONGEST = 1 << 17  # bytes of a request: arguments, folder and environment

# Which anything else that is asked of `python` goes past. Isolated and without `site`, it starts in 20 milliseconds.
CLIENT = """\
#!{python} -IS
import json, os, socket, sys
if sys.argv[1:3] != ["-m", "pipeline"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
request = json.dumps([sys.argv[3:], os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
    asked.connect({address!r})
    socket.send_fds(asked, [request], [0, 1, 2])
    sys.exit(int(asked.recv(8) or b"70"))
"""


@contextmanager
def preloaded_python(folder: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """The folder of that `python`, to be put first on PATH.

    Args:
        folder: an empty one, with a short path (an address of 107 bytes at most).
        environment: what the libraries see while they are imported.
    """
    address = folder / "socket"
    (folder / "python").write_text(CLIENT.format(python=sys.executable, address=str(address)), encoding="utf-8")
    (folder / "python").chmod(0o755)
    command = [sys.executable, "-P", __file__, str(address)]
    with subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE, cwd=folder) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n", "the libraries do not load"
            yield folder
        finally:
            server.terminate()


def _serve(address: str) -> list[str]:
    """Fork for every request; returns only in the forks, with their arguments."""
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
    """Fork once more, tell how that one ended, and end; returns in the fork, with its arguments."""
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


if __name__ == "__main__":
    arguments = _serve(sys.argv[1])
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    invalidate_caches()
    sys.argv = ["pipeline", *arguments]
    runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
