"""A throw-away copy of the repository, and commands run in it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.tiny import ROOT, write_tiny

ENVIRONMENT = {
    **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1",
    "DVC_SITE_CACHE_DIR": "", "PYTHONPATH": "", "GIT_CONFIG_GLOBAL": os.devnull,
}  # fmt: skip


def run(copy, *command, check=True):
    done = subprocess.run(command, cwd=copy, env=ENVIRONMENT, text=True, capture_output=True, check=False)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def compose(copy, *overrides):
    text = run(copy, "python", "-m", "pipeline", "sweep", "--cfg", "job", "--resolve", *overrides)
    (copy / "params.yaml").write_text(text, encoding="utf-8")


def killed(copy, command, ready):
    """Start a command, send it SIGKILL once `ready()` is true, which is asked while it is stopped."""
    process = subprocess.Popen(command, cwd=copy, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        if ready():
            process.kill()
            break
        process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL, "the command ended before it could be killed"


def checked_out(copy):
    """A throw-away copy of the repository without results, with a tiny model below scratch/."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("results/") and name != "dvc.lock":
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    write_tiny(copy / "scratch/tiny")
    run(copy, "git", "init", "-q")
    run(copy, "dvc", "config", "core.site_cache_dir", str(copy / ".dvc" / "site"))
    return copy


def commit(copy, message):
    run(copy, "git", "add", "-A")
    run(copy, "git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", "commit", "-qm", message)
