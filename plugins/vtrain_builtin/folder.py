"""Data backend "folder": every file below a local folder, or below a URL that fsspec knows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, BinaryIO, Protocol, cast
from urllib.parse import urlsplit, urlunsplit

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationInfo

from vtrain.contract import DataBackend, DataBackendSpec, DataError, LocalPath, Options, Problem, SourceRef

_LOCAL = TypeAdapter[Path](LocalPath)

_VERSION_KEYS = ("ETag", "etag", "sha256", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "created")
"""Where fsspec's file systems tell that a file changed, the surest first."""


def _place(value: object, info: ValidationInfo) -> str:
    if isinstance(value, str) and "://" in value:
        return value
    return os.path.abspath(_LOCAL.validate_python(value, context=info.context))  # noqa: PTH100 (follows no link)


class FolderOptions(Options):
    """Options of the "folder" backend."""

    path: Annotated[str, BeforeValidator(_place)] = Field(
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
        """Version: the time of change in nanoseconds. Raises DataError."""
        if not self._root.is_dir():
            what = "is not a folder." if self._root.exists() else "the dataset folder does not exist."
            raise DataError(Problem(self.location, what, "Set data.path to the folder that holds the clips."))
        found = list(self._walk())
        yield from sorted(found, key=lambda ref: ref.id)

    def open(self, ref: SourceRef) -> BinaryIO:
        return (self._root / ref.id).open("rb")

    def file(self, ref: SourceRef) -> Path:
        return self._root / ref.id

    def _walk(self) -> Iterator[SourceRef]:
        for name, folders, files in os.walk(self._root, onerror=self._unreadable, followlinks=True):
            folder = Path(name)
            if self._leads_back(folder):
                folders.clear()
                continue
            for file in files:
                yield self._ref(folder / file)

    def _leads_back(self, folder: Path) -> bool:
        """Whether this is a link to a folder around it."""
        around = folder.relative_to(self._root).parents
        return folder.is_symlink() and any(folder.samefile(self._root / parent) for parent in around)

    def _ref(self, file: Path) -> SourceRef:
        """A link to nothing is listed too, with size 0, so that it is reported and not passed over."""
        name = file.relative_to(self._root).as_posix()
        try:
            status = file.stat()
        except OSError:
            return SourceRef(name, 0, "unreadable")
        return SourceRef(name, status.st_size, str(status.st_mtime_ns))

    def _unreadable(self, error: OSError) -> None:
        what = f"the folder cannot be listed: {error.strerror or error}."
        raise DataError(Problem(str(error.filename or self.location), what, "Check its permissions.")) from error


class _FileSystem(Protocol):
    """What is used of an fsspec file system."""

    def isdir(self, path: str) -> bool: ...
    def find(self, path: str, *, detail: bool) -> Mapping[str, Mapping[str, object]]: ...
    def open(self, path: str, mode: str) -> BinaryIO: ...


class RemoteFolder:
    """A folder behind a URL. location: the URL without user, password and query."""

    def __init__(self, url: str) -> None:
        self._url = url
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        self.location = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self._opened: tuple[_FileSystem, str] | None = None

    def refs(self) -> Iterator[SourceRef]:
        """Version: the storage's own tag, or time of change, of a file. Raises DataError."""
        try:
            system, root = self._file_system()
            found = system.find(root, detail=True)
            missing = not found and not system.isdir(root)
        except (OSError, ValueError, ImportError) as error:
            what = f"the dataset cannot be listed: {error}."
            raise DataError(Problem(self.location, what, "Check data.path and the access to it.")) from error
        if missing:
            remedy = "Set data.path to the folder that holds the clips."
            raise DataError(Problem(self.location, "the dataset folder does not exist.", remedy))
        skip = len(root.rstrip("/")) + 1
        refs = [self._ref(path[skip:], info) for path, info in found.items()]
        yield from sorted(refs, key=lambda ref: ref.id)

    def open(self, ref: SourceRef) -> BinaryIO:
        system, root = self._file_system()
        return system.open(f"{root.rstrip('/')}/{ref.id}", "rb")

    def _ref(self, name: str, info: Mapping[str, object]) -> SourceRef:
        size = info.get("size")
        version = next((f"{key} {info[key]}" for key in _VERSION_KEYS if info.get(key)), "")
        return SourceRef(name, size if isinstance(size, int) else 0, version)

    def _file_system(self) -> tuple[_FileSystem, str]:
        if self._opened is None:
            from fsspec.core import url_to_fs

            system, root = url_to_fs(self._url)
            self._opened = cast("_FileSystem", system), str(root)
        return self._opened


def _build(options: FolderOptions) -> DataBackend:
    return RemoteFolder(options.path) if "://" in options.path else LocalFolder(options.path)


FOLDER = DataBackendSpec(
    name="folder",
    summary="video files and captions below a folder, or below a URL through fsspec",
    options=FolderOptions,
    build=_build,
)
