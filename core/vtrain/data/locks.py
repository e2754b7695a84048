"""Locks between runs: on one byte of a file, until it is closed or the process ends, however it ends."""

from __future__ import annotations

import errno
import os
import struct
import sys
from typing import BinaryIO, Literal

if sys.platform != "win32":
    import fcntl

Outcome = Literal["ours", "taken", "no locks"]

_TAKEN = (errno.EACCES, errno.EAGAIN)


def lock(file: BinaryIO, place: int) -> Outcome:
    """Lock the byte at `place`, which need not exist, of a file open for writing. Never waits.

    "taken": another handle has it, of another process or, on Linux, of this one; "no locks": this system or file system has
    none. The lock goes when the file is closed, or when this process ends; elsewhere than on Linux also when any other handle of
    the file is closed here: hold one for all. A process that it starts does not have it.
    """
    if sys.platform == "win32":
        return "no locks"
    try:
        _set(file, place, fcntl.F_WRLCK)
    except OSError as error:
        return "taken" if error.errno in _TAKEN else "no locks"
    return "ours"


def unlock(file: BinaryIO, place: int) -> None:
    if sys.platform != "win32":
        try:
            _set(file, place, fcntl.F_UNLCK)
        except OSError:
            return


def _set(file: BinaryIO, place: int, kind: int) -> None:
    """By open file description where there is such a thing, so that two runs of one process keep each other out too.

    POSIX's own record locks belong to a process, and closing any handle of the file drops them. Raises OSError.
    """
    if sys.platform == "linux":
        flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, place, 1, 0)  # struct flock of 64-bit Linux, pid 0
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, flock)
    elif sys.platform != "win32":
        fcntl.lockf(file, fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
