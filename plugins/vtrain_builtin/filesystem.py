"""What is used of an fsspec file system: calls with a limit on their time, and ranges of files."""

from __future__ import annotations

from functools import partial
from typing import Any, BinaryIO, Protocol

from vtrain_builtin.attempts import Attempts, StorageError


class FileSystem(Protocol):
    """What is used of an fsspec file system."""

    protocol: str | tuple[str, ...]
    async_impl: bool
    loop: Any

    def ls(self, path: str, detail: bool) -> list[dict[str, Any]]: ...
    def info(self, path: str) -> dict[str, Any]: ...
    def open(self, path: str, mode: str) -> BinaryIO: ...
    def invalidate_cache(self) -> None: ...
    def _strip_protocol(self, path: str) -> str: ...


class Ranges:
    """Reads ranges of one file; a connection that drops is made again where it broke off. Raises StorageError."""

    def __init__(self, system: FileSystem, path: str, attempts: Attempts) -> None:
        self._system, self._path, self._attempts = system, path, attempts
        self._file: BinaryIO | None = None

    def __call__(self, start: int, end: int) -> bytes:
        parts: list[bytes] = []
        at = start
        while at < end:
            part = self._attempts(partial(self._some, at, end), failed=self._drop)
            if len(part) > end - at:
                raise StorageError("the server sends whole files where a part is asked for (it knows no ranges)")
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _some(self, start: int, end: int) -> bytes:
        """At least one byte."""
        if self._system.async_impl:
            part = call(self._system, "cat_file", self._path, timeout=self._attempts.timeout, start=start, end=end)
        else:
            if self._file is None:
                self._file = self._system.open(self._path, "rb")
            self._file.seek(start)
            part = self._file.read(end - start)
        if not part:
            raise OSError(f"it ends at byte {start}, before its listed size")
        return bytes(part)

    def _drop(self) -> None:
        self._file = None


def call(system: FileSystem, method: str, *arguments: Any, timeout: float, **named: Any) -> Any:
    """A method of a file system, with a limit on its time where it is asynchronous inside."""
    if not system.async_impl:
        return getattr(system, method)(*arguments, **named)
    from fsspec.asyn import sync

    return sync(system.loop, getattr(system, f"_{method}"), *arguments, timeout=timeout, **named)
