"""Reading a file's bytes once: for its content hash, for decoding, which seeks, and for all windows of a remote file in a row."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO, cast

from vtrain.contract import DataBackend, SourceRef
from vtrain.data.decoding.video import FileFault, faults

IN_MEMORY = 64 << 20
"""Bytes of a remote file that are kept in memory; one that is longer goes to the folder for temporary files."""

MOST = 32 << 30
"""Bytes of the longest remote file that is taken."""

_CHUNK = 1 << 20


@contextmanager
def hashed(stream: BinaryIO, most: int = MOST) -> Iterator[tuple[str, BinaryIO]]:
    """SHA-256 of all its bytes, and a file with the same bytes from their start. Raises FileFault.

    A local file is read once and rewound (its pages are then in memory); if it changes before the block ends, that is
    a fault. Others are spooled, so that nothing is fetched twice.
    """
    if is_local(stream):
        before = _state(stream)
        yield _sha256(stream), stream
        if _state(stream) != before:
            raise FileFault("changed while it was read", lasting=False)
        return
    # Decoding seeks: without a copy, what it comes back to would be fetched again.
    with cast("BinaryIO", tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)) as copy:
        digest, length = hashlib.sha256(), 0
        with faults("cannot be fetched"):
            while chunk := stream.read(_CHUNK):
                length += len(chunk)
                if length > most:
                    raise FileFault(f"is longer than the {most / (1 << 30):g} GiB that are fetched of a remote file")
                digest.update(chunk)
                copy.write(chunk)
            copy.seek(0)
        yield digest.hexdigest(), copy


def is_local(stream: BinaryIO) -> bool:
    """Whether this is a plain file of this machine, whose descriptor gives all its bytes."""
    return isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO)


def _sha256(stream: BinaryIO) -> str:
    with faults("cannot be read"):
        digest = hashlib.file_digest(cast("io.BufferedReader", stream), "sha256")
        stream.seek(0)
    return digest.hexdigest()


def _state(stream: BinaryIO) -> tuple[int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


@dataclass
class _Copy:
    """path: of the copy, once there is one."""

    lock: Lock = field(default_factory=Lock)
    path: Path | None = None


class Copies(AbstractContextManager["Copies"]):
    """Copies of remote files in a temporary folder, the newest few; they go with the folder.

    keep: more than threads read at the same time.
    """

    def __init__(self, keep: int) -> None:
        self._keep, self._lock = keep, Lock()
        self._copies: OrderedDict[tuple[str, SourceRef], _Copy] = OrderedDict()
        self._folder = tempfile.TemporaryDirectory(prefix="vtrain-clips-")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def of(self, backend: DataBackend) -> DataBackend:
        """The backend, its remote files opened as copies."""
        return _Copied(backend, self)

    def open(self, backend: DataBackend, ref: SourceRef) -> BinaryIO:
        """The copy, or a file that is local as it is. Raises what the backend raises, and OSError for a full disk."""
        copy = self._copy((backend.location, ref))
        # Whoever wants the same file waits for the one fetch of it; others go on.
        with copy.lock:
            if copy.path is None:
                stream = backend.open(ref)
                if is_local(stream):
                    return stream
                with stream, tempfile.NamedTemporaryFile(dir=self._folder.name, delete=False) as target:
                    shutil.copyfileobj(stream, target, 1 << 20)
                copy.path = Path(target.name)
            return copy.path.open("rb")

    def _copy(self, key: tuple[str, SourceRef]) -> _Copy:
        """The file's place, now the newest; the oldest goes."""
        with self._lock:
            copy = self._copies.setdefault(key, _Copy())
            self._copies.move_to_end(key)
            if len(self._copies) > self._keep:
                _, oldest = self._copies.popitem(last=False)
                if oldest.path is not None:
                    oldest.path.unlink(missing_ok=True)  # those who have it open read on
            return copy


@dataclass(frozen=True)
class _Copied:
    """A DataBackend that opens copies."""

    backend: DataBackend
    copies: Copies

    @property
    def location(self) -> str:
        return self.backend.location

    def refs(self) -> Iterator[SourceRef]:
        return self.backend.refs()

    def open(self, ref: SourceRef) -> BinaryIO:
        return self.copies.open(self.backend, ref)
