"""Stage dial as a process of its own: its progress as it goes, the time that is left, and an end at any moment."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config.errors import UserError

_BAR = re.compile(r"(prepare|Epoch (\d+)[^:]*):\s+\d+%\|[^|]*\|\s*(\d+)/(\d+) \[[\d:]+<([\d:]+|\?)")  # as tqdm draws it
_PATIENCE = 5.0  # seconds that a process has to end by itself


@dataclass(frozen=True)
class Progress:
    """How far a dial is."""

    step: str  # in words
    done: int = 0
    total: int = 0
    left: str | None = None  # time that this step still needs, as tqdm estimates it
    seconds: float = 0.0  # since the start

    def __str__(self) -> str:
        counted = f" {self.done} of {self.total}" if self.total else ""
        left = f", {self.left} left" if self.left else ""
        return f"{self.step}{counted} ({self.seconds:.0f} s so far{left})"


class DialProcess:
    """At most one dial in the making."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False

    def make(self, name: str, wanted: str, unwanted: str) -> Iterator[Progress]:
        """Yield the progress of a dial of the project in the current folder until it is finished or cancelled.

        Raises:
            UserError: one is in the making already, or it could not be made: what its last line says.
        """
        if self._process is not None:
            raise UserError("a dial is in the making: wait for it, or cancel it.")
        command = [sys.executable, "-m", "pipeline", "dial"]
        command += [f"--name={name}", f"--wanted={wanted}", f"--unwanted={unwanted}"]
        started, last, self._cancelled = time.monotonic(), "", False
        self._process = process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1
        )
        try:
            yield Progress("starting")
            assert process.stdout is not None
            for line in process.stdout:  # text mode ends lines at a carriage return as well
                if line.strip():
                    last = line.strip()
                match = _BAR.search(line)
                if match is not None:
                    step = "sampling responses" if match[1] == "prepare" else f"training, epoch {int(match[2]) + 1},"
                    left = None if match[5] == "?" else match[5]
                    yield Progress(step, int(match[3]), int(match[4]), left, time.monotonic() - started)
            if process.wait() and not self._cancelled:
                raise UserError(last.removeprefix("error: ") or "the dial's process ended without a word.")
            yield Progress("cancelled" if self._cancelled else "finished", seconds=time.monotonic() - started)
        finally:  # also where whoever reads along goes away
            self._end(process)
            self._process = None

    @property
    def was_cancelled(self) -> bool:
        """Whether the last one was ended by `cancel`."""
        return self._cancelled

    def cancel(self) -> None:
        """End the dial in the making, if there is one; what it sampled stays in the row store."""
        if self._process is not None:
            self._cancelled = True
            self._end(self._process)

    def _end(self, process: "subprocess.Popen[str]") -> None:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
