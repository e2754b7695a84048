"""Claims: which entries a process is about to make, so that two runs that fill one cache do not both make them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from vtrain.data.caching.peers import digest64
from vtrain.data.locks import lock, unlock
from vtrain.data.scanning.database import make_folder

FILE = "claims"


class Claims(AbstractContextManager["Claims"]):
    """What this process has claimed in a cache folder. Raises DataError if the folder cannot be written.

    A claim is a lock on one byte of an empty file, far behind its end: it ends with the process, however that ends, and
    nothing is left to clean up. Claims are a courtesy: where the file system has no locks every claim succeeds, and the
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
        """Claim what goes by that name; False if another process has it. Never waits."""
        return lock(self._open(), digest64(name) >> 2) != "taken"

    def drop(self, name: str) -> None:
        if self._file is not None:
            unlock(self._file, digest64(name) >> 2)

    def _open(self) -> BinaryIO:
        # One file for all: a process that closes any handle of a file lets go of all its locks on it.
        if self._file is None:
            make_folder(self._path.parent)
            self._file = self._path.open("ab")
        return self._file
