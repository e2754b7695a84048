"""Clips whose bytes stand in a column of Parquet files: each file is a shard, each row a clip."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

from vtrain.contract import DataError, Problem, SourceRef, Words
from vtrain_builtin.files import NamedFiles
from vtrain_builtin.manifest_table import ManifestOptions, NamedBy, Record, Tables, clip_name, manifest_location, told
from vtrain_builtin.ordered import sorted_rows
from vtrain_builtin.parquet_cells import Cells
from vtrain_builtin.rows import TableFault

_VERSION = re.compile(r"([0-9a-f]{32}) (\d+) (\d+)")


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
