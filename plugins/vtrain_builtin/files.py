"""The files that a path with patterns names, local or behind a URL: what tar shards and manifests are.

"shard-{000..011}.tar", "part-*/x.tar": braces name files; wildcards search for them. Wildcards are fsspec's. Its globs know no
braces, nor do Python's; bracex, which is kept up, reads other names out of the same path: of "{01..100}" it makes "001" where this
makes "01", it leaves "{a}" and "${a,b}" as they are, takes "\\" for an escape, and counts "{5..1}" down, which is an error here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import BinaryIO, Protocol, cast

from vtrain.contract import DataError, Problem, SourceRef
from vtrain_builtin.folder import LocalFolder
from vtrain_builtin.place import PlaceOptions, StorageError, is_url
from vtrain_builtin.seekable import FilePart
from vtrain_builtin.storage import Storage

_READ = 1 << 16
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[]")
_STARS = re.compile(r"\*{2,}")

MOST = 100_000
"""Names that the braces of one path may stand for."""


def expand(path: str) -> list[str]:
    """Every path that the braces stand for: "{000..011}" counts with leading zeros, "{a,b}" lists. Raises ValueError."""
    found = [path]
    while _BRACES.search(found[0]):
        found = list(islice(chain.from_iterable(map(_once, found)), MOST + 1))
        if len(found) > MOST:
            raise ValueError(f"the braces of {path} stand for more than {MOST:,} files")
    return found


def _once(path: str) -> Iterator[str]:
    """With its first pair of braces expanded."""
    match = _BRACES.search(path)
    if match is None:
        yield path
        return
    counted = _RANGE.fullmatch(match[1])
    if counted is None:
        words = match[1].split(",")
    else:
        low, high = int(counted[1]), int(counted[2])
        if high < low or high - low > MOST:
            raise ValueError(f"{match[0]} counts from {low} to {high}: write at most {MOST:,} files, upwards")
        width = len(counted[1])
        words = [f"{number:0{width}}" for number in range(low, high + 1)]
    for word in words:
        yield path[: match.start()] + word + path[match.end() :]


def is_wild(path: str) -> bool:
    return bool(_WILD.search(path))


def split(path: str) -> tuple[str, str]:
    """(folder, rest): the folder has no pattern in it, and the rest is all from the first part that has one, or the name."""
    scheme, mark, rest = path.rpartition("://")
    parts = rest.split("/")
    plain = next((n for n, part in enumerate(parts[:-1]) if is_wild(part) or "{" in part), len(parts) - 1)
    return scheme + mark + "/".join(parts[:plain]), "/".join(parts[plain:])


def matcher(pattern: str) -> re.Pattern[str]:
    """ "*" and "?" stay within a folder, "**/" goes through any number of them, "[abc]" is one of these characters.

    Raises ValueError for "**" as a part of a folder's name.
    """
    from fsspec.utils import glob_translate

    *folders, name = pattern.replace("[^", "[!").split("/")  # to fsspec "^" is a character, to shells it is "!"
    return re.compile(glob_translate("/".join([*folders, _STARS.sub("*", name)])))


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
        return cast("BinaryIO", io.BufferedReader(FilePart(self._folder.open(ref), start, size), _READ))


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
        if path.startswith(("http://", "https://")):  # there "?" starts the query, elsewhere it is a wildcard
            path, mark, query = path.partition("?")
        base, self._pattern = split(path.rstrip("/"))
        is_file = "{" in self._pattern or self._pattern.lower().endswith(suffixes)
        if not is_file and not is_wild(self._pattern):
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
        return not self._pattern or is_wild(self._pattern)

    def _searched(self) -> Iterator[SourceRef]:
        try:
            matchers = [matcher(one) for one in self._expanded()] if self._pattern else []
        except ValueError as error:
            raise self._wrong(error) from error
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

    def _expanded(self) -> list[str]:
        try:
            return expand(self._pattern)
        except ValueError as error:
            raise self._wrong(error) from error

    def _wrong(self, error: ValueError) -> DataError:
        return DataError(Problem(self.location, f"the pattern cannot be read: {error}.", "Set data.path to another."))

    def _is_one(self, name: str) -> bool:
        hidden = name.startswith(".") or "/." in name
        return not hidden and name.lower().endswith(self._suffixes)

    def _named(self) -> Iterator[SourceRef]:
        names = sorted(set(self._expanded()))
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
