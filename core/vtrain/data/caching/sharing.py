"""Work shared between the processes of a run, and leases of it between runs that share a cache folder; locks between runs."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

from vtrain.contract import VtrainError
from vtrain.data.scanning.database import make_folder

if sys.platform != "win32":
    import fcntl

Outcome = Literal["ours", "taken", "no locks"]

_TAKEN = (errno.EACCES, errno.EAGAIN)  # POSIX lets a system say either


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


FILE = "leases"


class Leases(AbstractContextManager["Leases"]):
    """What this process has claimed in a cache folder. Raises DataError if the folder cannot be written.

    A lease is a lock on one byte of an empty file, far behind its end: it ends with the process, however that ends, and
    nothing is left to clean up. Leases are a courtesy: where the file system has no locks every lease is given, and the
    worst is that something is made twice.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._file: BinaryIO | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def take(self, name: str) -> bool:
        """Lease what goes by that name; False if another process has it. Never waits."""
        # >> 2: an offset in a file is a signed number of 64 bits.
        return lock(self._open(), digest64(name) >> 2) != "taken"

    def drop(self, name: str) -> None:
        if self._file is not None:
            unlock(self._file, digest64(name) >> 2)

    def _open(self) -> BinaryIO:
        # One file for all: a process that closes any handle of a file lets go of all its locks on it.
        if self._file is None:
            make_folder(self._path.parent)
            self._file = self._path.open("ab")  # a lock for writing needs a file that is open for it
        return self._file


T = TypeVar("T")
Y = TypeVar("Y")


class Peers(Protocol):
    """This process among those of its run."""

    @property
    def count(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def gathered(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other; each waits for all."""
        ...


@dataclass(frozen=True)
class Alone:
    """A run of one process."""

    count: int = 1
    rank: int = 0

    def gathered(self, values: list[Any]) -> list[Any]:
        return values


ALONE = Alone()


def is_share(peers: Peers, name: str) -> bool:
    """Whether what goes by this name falls to this process: by a hash, so that nobody need see the whole."""
    return digest64(name) % peers.count == peers.rank


def digest64(name: str) -> int:
    """64 bits that stand for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def together(peers: Peers, work: Callable[[], T]) -> list[T]:
    """Do this process's share of some work and wait for the others: what it gave on each, by rank.

    What went wrong for the user on any of them is raised on all, as one error with all problems; the first tells it.
    """
    result, failure = None, None
    try:
        result = work()
    except VtrainError as error:
        failure = error
    return _agreed(peers, result, failure)


def together_telling(peers: Peers, work: Generator[Y, None, T]) -> Generator[Y, None, list[T]]:
    """The same of work that tells how far it is."""
    result, failure = None, None
    try:
        result = yield from work
    except VtrainError as error:
        failure = error
    return _agreed(peers, result, failure)


def _agreed(peers: Peers, result: Any, failure: VtrainError | None) -> list[Any]:
    # Also after a failure: the others wait for this process's word.
    gathered = peers.gathered([(result, failure)])
    failures: list[VtrainError] = [failure for _, failure in gathered if failure is not None]
    if failures:
        problems = dict.fromkeys(problem for failure in failures for problem in failure.problems)
        one = failure if len(failures) == 1 and failure is not None else type(failures[0])(problems)
        one.reported = peers.rank > 0
        raise one
    return [result for result, _ in gathered]
