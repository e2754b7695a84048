"""Data backend "folder": every file below a local folder, or below a URL that fsspec knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from pydantic import Field

from vtrain.contract import DataBackend, DataBackendSpec, SourceRef
from vtrain_builtin.attempts import StorageError
from vtrain_builtin.local import LocalFolder
from vtrain_builtin.place import PlaceOptions, PlacePath, is_url
from vtrain_builtin.storage import Storage


class FolderOptions(PlaceOptions):
    """Options of the "folder" backend."""

    path: PlacePath = Field(
        min_length=1,
        description='folder of the dataset, or a URL of fsspec such as "s3://bucket/clips"; a relative path starts at '
        "the configuration file",
    )


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
