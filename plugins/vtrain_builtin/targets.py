"""What the rows of a manifest name: local files and URLs, asked for their size and version, and opened."""

from __future__ import annotations

import os
import posixpath
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

from vtrain.contract import SourceRef
from vtrain_builtin.attempts import StorageError
from vtrain_builtin.place import PlaceOptions, Redaction, is_url
from vtrain_builtin.storage import Storage

_AT_ONCE = 256
_SECRET = "?"
"""Stands in a version for a URL that holds secrets, which are not written down."""


@dataclass(frozen=True)
class Target:
    """A file that a row names. place: an absolute path or a URL. fault: why it cannot be told which, or ""."""

    id: str
    place: str
    fault: str = ""


def target_of(value: str, base: str, folder: str) -> Target:
    """The file of a path or URL in a manifest.

    base: the path or URL of the dataset's folder, to which ids are relative; folder: of the manifest in it. Raises ValueError.
    """
    if is_url(value):
        location = Redaction(value).location
        inside = location.startswith(f"{Redaction(base).location}/")
        return Target(location[len(Redaction(base).location) + 1 :] if inside else location, value)
    if is_url(base):
        return _relative_url(value, base, folder)
    if value.startswith(("file://", "local://")):
        value = unquote(urlsplit(value).path)
    place = posixpath.normpath(posixpath.join(base, folder, value))
    root = base.rstrip("/") + "/"
    return Target(place[len(root) :] if place.startswith(root) else f"file:{place}", place)


def _relative_url(value: str, base: str, folder: str) -> Target:
    if value.startswith(("/", "file://", "local://")):
        raise ValueError("names a local file, and the manifest is not local")
    name = posixpath.normpath(posixpath.join(folder, value))
    if name.startswith("../"):
        raise ValueError("leads out of the manifest's place")
    if not base.startswith(("http://", "https://")):
        return Target(name, f"{base.rstrip('/')}/{name}")
    plain, mark, query = base.partition("?")
    return Target(name, f"{plain.rstrip('/')}/{quote(name)}{mark}{query}")


class Targets:
    """Looks files up and opens them. again: all targets, for those whose URLs are not written down."""

    def __init__(self, options: PlaceOptions, again: Callable[[], Iterator[Target]]) -> None:
        self._options, self._again = options, again
        self._storages: dict[str, Storage] = {}
        self._lock = Lock()
        self._secret: sqlite3.Connection | None = None

    def refs(self, targets: Iterable[Target]) -> Iterator[SourceRef]:
        """In the order of the targets. One that is not there is told, and does not open. Raises StorageError."""
        remaining = iter(targets)
        while several := list(islice(remaining, _AT_ONCE)):
            remote = self._look_up([target.place for target in several if is_url(target.place)])
            for target in several:
                yield self._ref(target, remote.get(target.place))

    def open(self, ref: SourceRef) -> BinaryIO:
        """Raises OSError."""
        if ref.version.startswith("!"):
            raise OSError(ref.version[1:])
        version, mark, place = ref.version.rpartition("\n")
        if not mark:
            raise FileNotFoundError(2, "no row of the manifest names it")
        if not is_url(place) and place != _SECRET:
            return Path(place).open("rb")
        url = self._secret_url(ref.id) if place == _SECRET else place
        return self._storage(url).open(SourceRef(url, ref.size, version))

    def _ref(self, target: Target, found: SourceRef | StorageError | None) -> SourceRef:
        if target.fault:
            return SourceRef(target.id, 1, f"!{target.fault}")
        if isinstance(found, StorageError):
            return SourceRef(target.id, 1, f"!{found.reason}")
        if found is not None:
            place = _SECRET if Redaction(target.place).words else target.place
            return SourceRef(target.id, found.size, f"{found.version}\n{place}")
        try:
            status = os.stat(target.place)  # noqa: PTH116 (one for each of a million rows)
        except OSError as error:
            return SourceRef(target.id, 1, f"!{target.place}: {error.strerror}")
        return SourceRef(target.id, status.st_size, f"{status.st_mtime_ns}\n{target.place}")

    def _look_up(self, urls: list[str]) -> dict[str, SourceRef | StorageError]:
        """Raises StorageError where no row could be read: without credentials, without the storage's package."""
        found: dict[str, SourceRef | StorageError] = {}
        groups: dict[int, tuple[Storage, list[str]]] = {}
        for url in urls:
            storage = self._storage(url)
            groups.setdefault(id(storage), (storage, []))[1].append(url)
        for storage, names in groups.values():
            for name, answer in zip(names, storage.look_up(names), strict=True):
                if isinstance(answer, StorageError) and (answer.denied or answer.absent_package):
                    raise answer
                found[name] = answer
        return found

    def _storage(self, url: str) -> Storage:
        parts = urlsplit(url)
        root = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        with self._lock:
            if root not in self._storages:
                own = urlsplit(self._options.path).scheme if is_url(self._options.path) else ""
                fits = parts.scheme == own if own else parts.scheme not in ("http", "https")
                options = self._options if fits else self._options.model_copy(update={"storage_options": {}})
                self._storages[root] = Storage(options, root)
            return self._storages[root]

    def _secret_url(self, name: str) -> str:
        """The manifest is read once more, into a temporary file without a name. Raises OSError."""
        with self._lock:
            if self._secret is None:
                self._secret = sqlite3.connect("", check_same_thread=False)
                self._secret.execute("CREATE TABLE target (id TEXT PRIMARY KEY, place TEXT)")
                secret = ((target.id, target.place) for target in self._again() if Redaction(target.place).words)
                self._secret.executemany("INSERT OR IGNORE INTO target VALUES (?, ?)", secret)
            row = self._secret.execute("SELECT place FROM target WHERE id = ?", (name,)).fetchone()
        if row is None:
            raise FileNotFoundError(2, "no row of the manifest names it")
        return str(row[0])
