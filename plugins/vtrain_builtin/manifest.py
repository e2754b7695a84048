"""Data backend "manifest": a table that names clips by path or URL, or holds their bytes, with captions beside them."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import BinaryIO

from vtrain.contract import DataBackend, DataBackendSpec, SourceRef, Words
from vtrain_builtin.attempts import StorageError
from vtrain_builtin.files import NamedFiles
from vtrain_builtin.manifest_bytes import BytesManifest
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
from vtrain_builtin.rows import SUFFIXES
from vtrain_builtin.targets import Target, Targets, target_of


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


def _build(options: ManifestOptions) -> DataBackend:
    return BytesManifest(options) if options.columns.bytes else PathManifest(options)


MANIFEST = DataBackendSpec(
    name="manifest",
    summary="a csv, jsonl or parquet table of paths, URLs or bytes, with captions",
    options=ManifestOptions,
    build=_build,
)
