"""Data backend "manifest": a table that names clips by path or URL, or holds their bytes, with captions beside them.

What its rows name is asked for its size and version, and opened.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

from vtrain.contract import DataBackend, DataBackendSpec, DataError, Problem, SourceRef, Words
from vtrain_builtin.files import NamedFiles
from vtrain_builtin.folder import sorted_rows
from vtrain_builtin.manifest_table import (
    ManifestOptions,
    NamedBy,
    Record,
    Tables,
    WrongRows,
    captions_of,
    clip_name,
    manifest_location,
)
from vtrain_builtin.place import PlaceOptions, Redaction, StorageError, is_url
from vtrain_builtin.rows import SUFFIXES, TableCells, TableFault
from vtrain_builtin.storage import Storage

_AT_ONCE = 256
_SECRET = "?"
"""Stands in a version for a URL that holds secrets, which are not written down."""


@dataclass(frozen=True)
class Target:
    """A file that a row names. place: an absolute path or a URL. fault: why it is not known which, or ""."""

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

    def __getstate__(self) -> tuple[PlaceOptions, Callable[[], Iterator[Target]]]:
        """Without connections: a copy in another process makes its own."""
        return self._options, self._again

    def __setstate__(self, state: tuple[PlaceOptions, Callable[[], Iterator[Target]]]) -> None:
        Targets.__init__(self, *state)

    def refs(self, targets: Iterable[Target]) -> Iterator[SourceRef]:
        """In the order of the targets. One that is not there is reported, and does not open. Raises StorageError."""
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


_VERSION = re.compile(r"([0-9a-f]{32}) (\d+) (\d+)")


class PathManifest:
    """A table of paths, relative to the table, and URLs of any storage. location: without secrets."""

    def __init__(self, options: ManifestOptions) -> None:
        self._options = options
        self._files = NamedFiles(options, SUFFIXES, "manifest")
        self._tables = Tables(self._files)
        self._targets = Targets(options, self._named)
        self.location = manifest_location(options, self._files)
        columns = {"path": options.columns.path or "path"}
        if options.columns.id:
            columns["id"] = options.columns.id
        self._named_by = NamedBy(columns, self._name)

    def refs(self) -> Iterator[SourceRef]:
        """Rows with the same path are one file. Each file is asked for its size and version. Raises DataError."""
        named = sorted_rows((target.id, json.dumps(target.place)) for target in self._named())
        try:
            yield from self._targets.refs(_one(name, same) for name, same in groupby(named, key=itemgetter(0)))
        except StorageError as error:
            raise error.at(self.location, "its files cannot be read") from error.__cause__

    def open(self, ref: SourceRef) -> BinaryIO:
        """Raises OSError."""
        return self._targets.open(ref)

    def captions(self, extras: Sequence[str] = ()) -> Iterator[tuple[str, Words]]:
        """Several rows of one path are several captions. Raises DataError."""
        return captions_of(self._options.columns, self._tables, self._named_by, extras)

    def _named(self) -> Iterator[Target]:
        """What each row names, in the order of rows. Raises DataError, after the last, for rows that name nothing."""
        wrong = WrongRows()
        for record in self._tables.records(self._named_by.columns):
            try:
                yield self._target(record)
            except ValueError as error:
                remedy = "Fix or remove the row; paths are relative to the manifest."
                wrong.add(f"{record.place}:{record.number}", f"the row {error}.", remedy)
        wrong.stop()

    def _name(self, record: Record) -> str | None:
        try:
            return self._target(record).id
        except ValueError:
            return None

    def _target(self, record: Record) -> Target:
        """Raises ValueError."""
        path = record.cells["path"]
        if not isinstance(path, str) or not path.strip():
            raise ValueError("names no file")
        target = target_of(path.strip(), self._files.base, posixpath.dirname(record.table.id))
        if "id" not in record.cells:
            return target
        name = clip_name(record.cells["id"], posixpath.splitext(target.id)[1])
        if name is None:
            raise ValueError("has no id")
        return Target(name, target.place)


def _one(name: str, same: Iterator[tuple[str, str]]) -> Target:
    """All rows of one id."""
    places = {str(json.loads(packed)) for _, packed in same}
    if len(places) == 1:
        return Target(name, places.pop())
    return Target(name, "", f"{len(places)} different files have this id in the manifest: set data.columns.id")


class BytesManifest:
    """Rows of Parquet files. A row's version is the hash of its bytes and where it stands. location: without secrets."""

    def __init__(self, options: ManifestOptions) -> None:
        self._options = options
        self._files = NamedFiles(options, (".parquet",), "Parquet file")
        self._tables = Tables(self._files, passes_over=True)  # by captions: they are shards that cannot be read
        self._column = str(options.columns.bytes)
        self._cells = TableCells(self._files.folder, self._column)
        self.location = manifest_location(options, self._files)
        self._named_by = NamedBy({"id": options.columns.id} if options.columns.id else {}, self._name)

    def shards(self) -> Iterator[SourceRef]:
        """The Parquet files. Raises DataError."""
        return self._files.refs()

    def members(self, shard: SourceRef) -> Iterator[SourceRef]:
        """Sorted by id; reads the bytes of all rows. Raises OSError, and DataError for a column that is missing."""
        try:
            yield from self._members(shard)
        except TableFault as fault:
            raise OSError(" ".join(f"{problem.what} {problem.remedy}" for problem in fault.problems)) from fault

    def _members(self, shard: SourceRef) -> Iterator[SourceRef]:
        needed = {"bytes": self._column, **self._named_by.columns}
        found = ((self._name(record), _row(record)) for record in self._tables.of(shard, needed, {}))
        unnamed = f"{shard.id}/(without an id){self._options.suffix}"
        named = ((name or unnamed, row) for name, row in found)
        for name, same in groupby(sorted_rows(named), key=itemgetter(0)):
            rows = [json.loads(row) for _, row in same]
            number, size, digest, fault = rows[0]
            if name == unnamed:
                fault = f"{len(rows)} rows have no id that names a file, the first is row {number}"
            elif len(rows) > 1:
                fault = f"{len(rows)} rows have this id, the first is row {number}"
            # The length tells where the shard's id ends: both it and the row's name may hold "/".
            version = f"!{fault}" if fault else f"{digest} {number} {len(shard.id)}"
            yield SourceRef(name, size or int(bool(fault)), version)

    def refs(self) -> Iterator[SourceRef]:
        """The rows of all files. Raises DataError."""
        for shard in sorted(self.shards(), key=lambda ref: f"{ref.id}/"):
            try:
                yield from self._members(shard)
            except OSError as error:
                what = f"the file cannot be read: {error.strerror or error}."
                raise DataError(Problem(self._tables.place(shard), what, "Repair it, or remove it.")) from error

    def open(self, ref: SourceRef) -> BinaryIO:
        """The row's bytes, in memory. Raises OSError."""
        if ref.version.startswith("!"):
            raise OSError(ref.version[1:])
        match = _VERSION.fullmatch(ref.version)
        if match is None:
            raise FileNotFoundError(2, "no row of the manifest is it")
        digest, number, length = match[1], int(match[2]), int(match[3])
        try:
            data = self._cells.read(ref.id[:length], number)
        except DataError as error:
            raise OSError(str(error)) from error
        if data is None or _digest(data) != digest:
            self._cells.forget(ref.id[:length])
            raise OSError(f"{ref.id[:length]} has changed since it was listed")
        return io.BytesIO(data)

    def captions(self, extras: Sequence[str] = ()) -> Iterator[tuple[str, Words]]:
        """Raises DataError."""
        return captions_of(self._options.columns, self._tables, self._named_by, extras)

    def _name(self, record: Record) -> str | None:
        name: str | None = f"{record.number:09}{self._options.suffix}"
        if self._options.columns.id:
            name = clip_name(record.cells["id"], self._options.suffix)
        return None if name is None else f"{record.table.id}/{name}"


def _row(record: Record) -> str:
    """Number, size, hash and fault of a row."""
    value: Any = record.cells["bytes"]
    data = b"" if value is None else value
    if not isinstance(data, bytes):
        return json.dumps([record.number, 1, "", f"row {record.number} holds no bytes, but {type(value).__name__}"])
    return json.dumps([record.number, len(data), _digest(data), ""])


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _build(options: ManifestOptions) -> DataBackend:
    return BytesManifest(options) if options.columns.bytes else PathManifest(options)


MANIFEST = DataBackendSpec(
    name="manifest",
    summary="a csv, jsonl or parquet table of paths, URLs or bytes, with captions",
    options=ManifestOptions,
    build=_build,
)
