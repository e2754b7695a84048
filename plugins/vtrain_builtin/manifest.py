"""Data backend "manifest": a table that names clips by path or URL, or holds their bytes, with captions beside them."""

from __future__ import annotations

import io
import json
import posixpath
import re
from collections.abc import Iterator
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

from vtrain.contract import DataBackend, DataBackendSpec, DataError, Problem, SourceRef, Words
from vtrain_builtin.attempts import StorageError
from vtrain_builtin.files import NamedFiles
from vtrain_builtin.manifest_table import (
    ManifestOptions,
    NamedBy,
    Record,
    Tables,
    WrongRows,
    clip_name,
    manifest_location,
    told,
)
from vtrain_builtin.ordered import sorted_rows
from vtrain_builtin.rows import SUFFIXES, Cells, TableFault
from vtrain_builtin.targets import Target, Targets, target_of

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

    def captions(self) -> Iterator[tuple[str, Words]]:
        """Several rows of one path are several captions. Raises DataError."""
        return told(self._options.columns, self._tables, self._named_by)

    def _named(self) -> Iterator[Target]:
        """What each row names, in the order of rows. Raises DataError, after the last, for rows that name nothing."""
        wrong = WrongRows()
        for record in self._tables.records(self._named_by.columns):
            try:
                yield self._target(record)
            except ValueError as error:
                remedy = "Mend or remove the row; paths are relative to the manifest."
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
        self._cells = Cells(self._files.folder, self._column)
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
        named = ((name or f"{shard.id}/(without an id){self._options.suffix}", row) for name, row in found)
        for name, same in groupby(sorted_rows(named), key=itemgetter(0)):
            rows = [json.loads(row) for _, row in same]
            number, size, digest, fault = rows[0]
            if "(without an id)" in name:
                fault = f"{len(rows)} rows have no id that names a file, the first is row {number}"
            elif len(rows) > 1:
                fault = f"{len(rows)} rows have this id, the first is row {number}"
            version = f"!{fault}" if fault else f"{digest} {number} {len(shard.id)}"
            yield SourceRef(name, size or int(bool(fault)), version)

    def refs(self) -> Iterator[SourceRef]:
        """The rows of all files. Raises DataError."""
        for shard in sorted(self.shards(), key=lambda ref: f"{ref.id}/"):
            try:
                yield from self._members(shard)
            except OSError as error:
                what = f"the file cannot be read: {error.strerror or error}."
                raise DataError(Problem(self._tables.place(shard), what, "Mend it, or leave it out.")) from error

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

    def captions(self) -> Iterator[tuple[str, Words]]:
        """Raises DataError."""
        return told(self._options.columns, self._tables, self._named_by)

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
