"""Every call by which a process changes files below a folder, counted in order, and one before which it dies as by kill -9.

What a killed process leaves is what its calls to the system had done by then. So a death before each call, and one with the file
that was written last torn in its middle, are all that a kill can leave. It asks nothing of the code that it looks at: Python
reports its calls (audit events), `os.fsync` is wrapped, and so is safetensors, which writes without Python.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
import safetensors.torch

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.chmod": 1, "os.truncate": 1, "os.link": 2}
"""Audit events, and how many paths each begins with."""


@dataclass(frozen=True)
class Point:
    """A moment of a run: before its call `number`, from 0. torn: the file written since the call before ends in its middle.

    refused: nothing is killed; from here on each call fails, as on a file system that has become read-only.
    """

    number: int
    torn: bool = False
    refused: bool = False

    def __str__(self) -> str:
        return f"{'torn ' * self.torn}{'read-only from' if self.refused else 'before'} call {self.number}"


@dataclass
class Failpoints:
    """Of the process that calls `watch`. calls: what it did, such as "os.rename step-000002.partial"; torn: before which of them
    a file had been written, so that it could be torn."""

    below: Path
    dies: Point | None = None
    calls: list[str] = field(default_factory=list)
    torn: list[int] = field(default_factory=list)
    _written: tuple[Path, int] | None = None
    _dying: bool = False
    _lock: Any = field(default_factory=threading.RLock)

    @property
    def points(self) -> list[Point]:
        """All of them."""
        return [Point(number) for number in range(len(self.calls))] + [Point(number, torn=True) for number in self.torn]

    def watch(self) -> None:
        """From here on, to the end of the process."""
        fsync: Callable[[int], None] = os.fsync
        serialize: Callable[..., Any] = safetensors.serialize_file

        def synced(descriptor: int) -> None:
            self.passed("os.fsync", _of(descriptor))
            fsync(descriptor)

        def serialized(tensors: Any, filename: Any, *rest: Any, **how: Any) -> Any:
            self.passed("serialize_file", Path(filename), writes_from=0)
            return serialize(tensors, filename, *rest, **how)

        os.fsync = synced
        for module in (safetensors, safetensors.numpy, safetensors.torch):
            module.serialize_file = serialized  # type: ignore[attr-defined]
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(args[0], int) and args[2] & WRITING:
            path = Path(os.fsdecode(args[0]))
            new = args[2] & os.O_TRUNC or not path.exists()
            nameless = path.is_dir()  # O_TMPFILE
            self.passed(event, path, writes_from=None if nameless else 0 if new else path.stat().st_size)
        elif event in CHANGING:
            folder = next((each for each in args[CHANGING[event] :] if type(each) is int and each > 2), None)
            if event in ("os.remove", "os.rmdir") and folder is not None:
                self.passed(event, _of(folder) / os.fsdecode(args[0]))
            elif not isinstance(args[0], int):
                self.passed(event, Path(os.fsdecode(args[0])))

    def passed(self, call: str, path: Path, writes_from: int | None = None) -> None:
        """A call that is about to be made. writes_from: bytes that the file keeps, where it is opened to be written."""
        if self._dying or not path.is_relative_to(self.below):
            return
        with self._lock:
            number = len(self.calls)
            if self._fresh:
                self.torn.append(number)
            if self.dies is not None and self.dies.refused and number >= self.dies.number:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            if self.dies is not None and not self.dies.refused and number == self.dies.number:
                self._dying = True
                if self.dies.torn and self._fresh:
                    self._tear()
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls.append(f"{call} {path.relative_to(self.below)}")
            self._written = None if writes_from is None else (path, writes_from)

    @property
    def _fresh(self) -> bool:
        """Whether a file has grown since the call before."""
        return self._written is not None and self._written[0].exists() and self._size > self._written[1]

    @property
    def _size(self) -> int:
        assert self._written is not None
        return self._written[0].stat().st_size

    def _tear(self) -> None:
        assert self._written is not None
        path, kept = self._written
        with path.open("rb+", buffering=0) as file:
            file.truncate(kept + (self._size - kept) // 2)


def _of(descriptor: int) -> Path:
    """The file behind it (Linux)."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def forked(act: Callable[[], None], below: Path, dies: Point | None = None) -> Failpoints | None:
    """Do it in a fork of this process, which dies there; what was called, None where it died. Raises RuntimeError if it fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        watched = Failpoints(below, dies)
        try:
            watched.watch()
            act()
            os.write(writing, json.dumps([watched.calls, watched.torn]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        found = said.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return None
    if not found:
        raise RuntimeError("it failed in the fork")
    return Failpoints(below, None, *json.loads(found))
