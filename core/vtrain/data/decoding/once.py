"""Fetching a remote file once for all windows that are decoded of it in a row."""

from __future__ import annotations

import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO

from vtrain.contract import DataBackend, SourceRef
from vtrain.data.decoding.spool import is_local


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
                    oldest.path.unlink(missing_ok=True)
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
