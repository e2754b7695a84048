"""The files that a path with patterns names, local or behind a URL: what tar shards and manifests are."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Protocol, cast

from vtrain.contract import DataError, Problem, SourceRef
from vtrain_builtin import pattern
from vtrain_builtin.attempts import StorageError
from vtrain_builtin.folder import LocalFolder
from vtrain_builtin.place import PlaceOptions, is_url
from vtrain_builtin.seekable import Section
from vtrain_builtin.storage import Storage

_READ = 1 << 16


class Folder(Protocol):
    """A local or remote folder in which files are looked up. Each member raises OSError."""

    location: str

    def refs(self) -> Iterator[SourceRef]: ...
    def look_up(self, names: Iterable[str]) -> Iterator[SourceRef | OSError]: ...
    def open(self, ref: SourceRef) -> BinaryIO: ...
    def section(self, ref: SourceRef, start: int, size: int) -> BinaryIO: ...


class LocalFiles:
    """Files of this machine."""

    def __init__(self, path: str) -> None:
        self.location = path
        self._folder = LocalFolder(path)

    def refs(self) -> Iterator[SourceRef]:
        return self._folder.refs()

    def look_up(self, names: Iterable[str]) -> Iterator[SourceRef | OSError]:
        for name in names:
            ref = self._folder.ref(name)
            yield FileNotFoundError(2, "there is no such file") if ref.version == "unreadable" else ref

    def open(self, ref: SourceRef) -> BinaryIO:
        return self._folder.open(ref)

    def section(self, ref: SourceRef, start: int, size: int) -> BinaryIO:
        return cast("BinaryIO", io.BufferedReader(Section(self._folder.open(ref), start, size), _READ))


class RemoteFiles:
    """Files behind a URL."""

    def __init__(self, options: PlaceOptions, url: str) -> None:
        self._storage = Storage(options, url)
        self.location = self._storage.location

    def refs(self) -> Iterator[SourceRef]:
        return self._storage.refs()

    def look_up(self, names: Iterable[str]) -> Iterator[SourceRef | OSError]:
        return self._storage.look_up(names)

    def open(self, ref: SourceRef) -> BinaryIO:
        return self._storage.open(ref)

    def section(self, ref: SourceRef, start: int, size: int) -> BinaryIO:
        return self._storage.section(ref.id, start, size)


class NamedFiles:
    """The files that `options.path` names. A folder stands for those in it, and below it, that end in `suffixes`.

    location: the path as it was written, without secrets. folder: what ids are relative to; base: its
    path or URL.
    """

    def __init__(self, options: PlaceOptions, suffixes: tuple[str, ...], noun: str) -> None:
        self._options, self._suffixes, self._noun = options, suffixes, noun
        path, mark, query = options.path, "", ""
        if path.startswith(("http://", "https://")):
            path, mark, query = path.partition("?")
        base, self._pattern = pattern.split(path.rstrip("/"))
        is_file = "{" in self._pattern or self._pattern.lower().endswith(suffixes)
        if not is_file and not pattern.is_wild(self._pattern):
            base, self._pattern = path.rstrip("/"), ""
        self.base = (base or "/") + mark + query
        self.folder: Folder = RemoteFiles(options, self.base) if is_url(options.path) else LocalFiles(self.base)
        self.location = "/".join(filter(None, (self.folder.location.rstrip("/"), self._pattern)))

    def refs(self) -> Iterator[SourceRef]:
        """Sorted by id. A file that braces name and that is not there is told with version "missing". Raises DataError."""
        try:
            yield from self._searched() if self._wild else self._named()
        except StorageError as error:
            raise error.at(self.location) from error.__cause__

    @property
    def _wild(self) -> bool:
        return not self._pattern or pattern.is_wild(self._pattern)

    def _searched(self) -> Iterator[SourceRef]:
        matchers = [pattern.matcher(one) for one in pattern.expand(self._pattern)] if self._pattern else []
        found = False
        for ref in self.folder.refs():
            named = any(one.fullmatch(ref.id) for one in matchers) if matchers else self._is_one(ref.id)
            if named:
                found = True
                yield ref
        if not found:
            what = f"no {self._noun} is called so." if matchers else f"no {self._noun} is in it."
            raise DataError(
                Problem(self.location, what, "Set data.path to the files, or to the folder that holds them.")
            )

    def _is_one(self, name: str) -> bool:
        hidden = name.startswith(".") or "/." in name
        return not hidden and name.lower().endswith(self._suffixes)

    def _named(self) -> Iterator[SourceRef]:
        names = sorted(set(pattern.expand(self._pattern)))
        answers = list(self.folder.look_up(names))
        failures = [answer for answer in answers if isinstance(answer, OSError)]
        if len(failures) == len(names):
            raise _told(failures[0], self.location, self._noun)
        for name, answer in zip(names, answers, strict=True):
            yield SourceRef(name, 1, "missing") if isinstance(answer, OSError) else answer


def _told(error: OSError, location: str, noun: str) -> DataError:
    if isinstance(error, StorageError):
        return error.at(location)
    what = f"the {noun} cannot be read: {error.strerror or error}."
    return DataError(Problem(location, what, "Set data.path to it."))
