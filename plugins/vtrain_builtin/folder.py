"""Data backend "folder": every file below a local folder, or below a URL that fsspec knows, in order, whatever their number."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from pydantic import Field

from vtrain.contract import DataBackend, DataBackendSpec, DataError, Problem, SourceRef
from vtrain_builtin.place import PlaceOptions, PlacePath, StorageError, is_url
from vtrain_builtin.storage import Storage

_IN_MEMORY = 1 << 16
"""Names that are sorted in memory."""


def in_order(names: Iterable[str]) -> Iterator[str]:
    """Sorted by code points. Beyond 65,536 a temporary file is used."""
    remaining = iter(names)
    first = list(islice(remaining, _IN_MEMORY))
    more = next(remaining, None)
    if more is None:
        first.sort()
        yield from first
        return
    rows = ((name, "") for name in chain(first, (more,), remaining))
    del first
    for name, _ in sorted_rows(rows):
        yield name


def sorted_rows(rows: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(key, text) by key, equal keys in the order given; sorted in a temporary file. Any text, lone surrogates too."""
    with closing(sqlite3.connect("", check_same_thread=False)) as database:  # "": a file without a name
        database.execute("PRAGMA cache_size = -16384")  # KiB: what the sort may take of memory
        # UTF-8 as bytes sorts by code points, and takes the surrogates that stand for other bytes of names.
        database.execute("CREATE TABLE row (key BLOB, number INTEGER PRIMARY KEY, text BLOB)")
        database.executemany(
            "INSERT INTO row (key, text) VALUES (?, ?)",
            ((key.encode("utf-8", "surrogatepass"), text.encode("utf-8", "surrogatepass")) for key, text in rows),
        )
        for key, text in database.execute("SELECT key, text FROM row ORDER BY key, number"):
            yield key.decode("utf-8", "surrogatepass"), text.decode("utf-8", "surrogatepass")


class FolderOptions(PlaceOptions):
    """Options of the "folder" backend."""

    path: PlacePath = Field(
        min_length=1,
        description='folder of the dataset, or a URL of fsspec such as "s3://bucket/clips"; a relative path starts at '
        "the configuration file",
    )


class LocalFolder:
    """A folder of this machine. Links are followed, but none to a folder around it. location: absolute path."""

    def __init__(self, path: str) -> None:
        self.location = path
        self._root = Path(path)

    def refs(self) -> Iterator[SourceRef]:
        """Version: the time of change in nanoseconds. One folder is held at a time. Raises DataError."""
        self.check("the clips")
        levels = [self.level(self._names(""))]
        while levels:
            name = next(levels[-1], None)
            if name is None:
                levels.pop()
            elif name.endswith("/"):
                if not self.leads_back(name):
                    levels.append(self.level(self._names(name)))
            else:
                yield self.ref(name)

    def ref(self, name: str) -> SourceRef:
        """A link to nothing is listed too, with size 0, so that it is reported and not passed over."""
        try:
            status = os.stat(f"{self.location}/{name}")  # noqa: PTH116 (a million of them: three times as fast)
        except OSError:
            return SourceRef(name, 0, "unreadable")
        return SourceRef(name, status.st_size, str(status.st_mtime_ns))

    def open(self, ref: SourceRef) -> BinaryIO:
        return open_plain(self._root / ref.id)

    def file(self, ref: SourceRef) -> Path:
        if self.ref(ref.id) != ref:
            raise OSError("it has changed since, or is gone")
        return self._root / ref.id

    def check(self, holds: str) -> None:
        """Raises DataError if this is no folder. holds: what it should."""
        if not self._root.is_dir():
            what = "is not a folder." if os.path.lexists(self.location) else "the dataset folder does not exist."
            raise DataError(Problem(self.location, what, f"Set data.path to the folder that holds {holds}."))

    def level(self, names: Iterator[str]) -> Iterator[str]:
        """Names in a folder as ids are sorted. Raises DataError where listing them fails."""
        try:
            yield from in_order(names)
        except OSError as error:
            what = f"the folder cannot be listed: {error.strerror or error}."
            raise DataError(Problem(str(error.filename or self.location), what, "Check its permissions.")) from error

    def _names(self, folder: str) -> Iterator[str]:
        """In a folder, from the root: folders end in "/"."""
        with os.scandir(f"{self.location}/{folder}") as entries:
            for entry in entries:
                # With its "/" a folder sorts as the ids below it do: after "a.mp4", and before "a0.mp4".
                yield f"{folder}{entry.name}/" if is_folder(entry) else folder + entry.name

    def leads_back(self, name: str) -> bool:
        """Whether this is a link to a folder around it."""
        folder = self._root / name
        if not folder.is_symlink():
            return False
        return any(folder.samefile(around) for around in folder.parents)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Of a link: whether it leads to a folder; false for one that leads to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def open_plain(path: Path) -> BinaryIO:
    """Raises OSError for what is no plain file, such as a pipe, at which a reader would wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("is a pipe, a socket or a device, and no file")
    return path.open("rb")


class RemoteFolder:
    """A folder behind a URL. location: the URL without secrets."""

    def __init__(self, options: PlaceOptions) -> None:
        self._storage = Storage(options)
        self.location = self._storage.location

    def refs(self) -> Iterator[SourceRef]:
        """Version: the storage's own tag, or time of change, of a file. Raises DataError."""
        try:
            yield from self._storage.refs()
        except StorageError as error:
            raise error.at(self.location) from error.__cause__

    def open(self, ref: SourceRef) -> BinaryIO:
        return self._storage.open(ref)


def _build(options: FolderOptions) -> DataBackend:
    return RemoteFolder(options) if is_url(options.path) else LocalFolder(options.path)


FOLDER = DataBackendSpec(
    name="folder",
    summary="video files and captions below a folder, or below a URL through fsspec",
    options=FolderOptions,
    build=_build,
)
