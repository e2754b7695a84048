"""Locks between processes: on one byte of a file, until the process ends, however it ends."""

from __future__ import annotations

import errno
import sys
from typing import BinaryIO, Literal

if sys.platform != "win32":
    import fcntl

Outcome = Literal["ours", "taken", "no locks"]

_TAKEN = (errno.EACCES, errno.EAGAIN)


def lock(file: BinaryIO, place: int) -> Outcome:
    """Lock the byte at `place`, which need not exist, of a file open for writing. Never waits.

    "taken": another process has it; "no locks": this system or file system has none. The lock goes when this process ends,
    or closes any handle of the file: hold one for all. A process that it starts does not have it.
    """
    if sys.platform == "win32":
        return "no locks"
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        return "taken" if error.errno in _TAKEN else "no locks"
    return "ours"


def unlock(file: BinaryIO, place: int) -> None:
    if sys.platform != "win32":
        try:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, place)
        except OSError:
            return
