"""Errors that the user can mend, and how a command ends with one."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


class UserError(Exception):
    """Something the user can mend: the message is one sentence saying what, where, and how."""


_DISK = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EROFS: "the file system is read-only: choose a folder that can be written",
    errno.EACCES: "permission denied: make the folder writable",
    errno.EPERM: "permission denied: make the folder writable",
    errno.EDQUOT: "the disk quota is used up: free some space",
}


@contextmanager
def guard() -> Iterator[None]:
    """Turn errors that the user can mend into one sentence and exit code 1; let all others through."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        reason = _DISK.get(_errno_of(error) or 0)
        if reason is None:
            raise
        file = getattr(error, "filename2", None) or getattr(error, "filename", None) or "writing"
        sys.exit(f"error: {file}: {reason} and run the same command again.")


def _errno_of(error: Exception) -> int | None:
    """The system's error number; safetensors and torch tell in words why they could not write."""
    if isinstance(error, SafetensorError):
        number = re.search(r"\(os error (\d+)\)", str(error))
        return int(number[1]) if number else None
    if isinstance(error, RuntimeError) and "inline_container.cc" in str(error) and "unexpected pos" in str(error):
        return errno.ENOSPC  # all that torch.save says where a file cannot grow
    return getattr(error, "errno", None)
