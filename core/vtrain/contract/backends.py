"""What a data backend must be, and what more it can be. As in protocols.py, abilities are found by isinstance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from vtrain.contract.records import SourceRef, Words


class DataBackend(Protocol):
    """Where files are. It decodes nothing and knows no video."""

    @property
    def location(self) -> str:
        """What names this place in the ledger: an absolute path or a URL, without secrets."""
        ...

    def refs(self) -> Iterator[SourceRef]:
        """Every file, sorted by id, never all in memory at once.

        Raises DataError when the place does not exist or cannot be read.
        """
        ...

    def open(self, ref: SourceRef) -> BinaryIO:
        """A seekable binary file, for a ref that `refs` gave, now or in an earlier process. Raises OSError."""
        ...


@runtime_checkable
class SupportsShards(Protocol):
    """A data backend whose files lie in shards (tar files): those that did not change are not listed again.

    `refs` is then the members of all shards. A member's id is "<shard's id>/<name in the shard>".
    """

    def shards(self) -> Iterator[SourceRef]:
        """The shards, sorted by id; cheap to list. Raises DataError."""
        ...

    def members(self, shard: SourceRef) -> Iterator[SourceRef]:
        """The files in a shard, sorted by id; reads its index. Raises OSError if it cannot be read."""
        ...


@runtime_checkable
class SupportsCaptions(Protocol):
    """A data backend that knows captions of its own (a manifest): data.captions = "backend" takes them."""

    def captions(self) -> Iterator[tuple[str, Words]]:
        """(id of the clip, its words), sorted by id, never all in memory at once. Raises DataError."""
        ...


@runtime_checkable
class SupportsFiles(Protocol):
    """A data backend whose files are files of this machine: data.on_bad_file = "move" may move them."""

    def file(self, ref: SourceRef) -> Path:
        """The file itself, at an absolute path. Raises OSError if it is no longer of this size and version."""
        ...
