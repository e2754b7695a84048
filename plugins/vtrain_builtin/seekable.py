"""Seekable files over bytes that lie elsewhere: a part of an open file, and ranges behind a URL with a bounded look-ahead."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

FIRST_BLOCK = 1 << 18
LARGEST_BLOCK = 1 << 23
"""Bytes asked for at once: the first after opening or a jump, doubled while the file is read on and answers come soon."""

_SOON = 2.0
"""Seconds: an answer that took longer does not make the next block larger."""

Fetch = Callable[[int, int], bytes]
"""(from, to) -> the bytes of a file in between, all of them. Raises OSError."""


class SizedFile(io.RawIOBase):
    """`size` bytes, to be read and sought. What is below it reads at `position`, and moves it on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Also past the end. Raises OSError for a position before the start."""
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise OSError(22, "Invalid argument")
        self.position = position
        return position


class FilePart(SizedFile):
    """`size` bytes of an open file from `start`. Closes it with itself."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        super().__init__(size)
        self._file, self._start = file, start

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self.size - self.position))
        self._file.seek(self._start + self.position)
        part = self._file.read(wanted)
        if len(part) < wanted and not part:
            raise OSError("the file ends before the part that is to be read")
        view[: len(part)] = part
        self.position += len(part)
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()


class RemoteFile(SizedFile):
    """`size` bytes from `start` of what `fetch` reads. Holds at most one block. The first is read at once.

    Raises OSError where the bytes cannot be had.
    """

    def __init__(self, fetch: Fetch, size: int, start: int = 0, first: int = FIRST_BLOCK) -> None:
        super().__init__(size)
        self._fetch, self._start, self._first = fetch, start, first
        self._held, self._held_from = b"", 0
        self._block = first
        self._fill()

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        view = memoryview(buffer).cast("B")
        if not len(view) or self.position >= self.size:
            return 0
        if not self._held_from <= self.position < self._held_from + len(self._held):
            self._fill()
        begin = self.position - self._held_from
        part = self._held[begin : begin + len(view)]
        view[: len(part)] = part
        self.position += len(part)
        return len(part)

    def close(self) -> None:
        self._held = b""
        super().close()

    def _fill(self) -> None:
        """Hold the block at the position."""
        if not self.size:
            return
        goes_on = self.position == self._held_from + len(self._held) and self.position > 0
        if not goes_on:
            self._block = self._first
        end = min(self.position + self._block, self.size)
        self._held = b""  # let go before the next one comes
        began = time.monotonic()
        held = self._fetch(self._start + self.position, self._start + end)
        self._held, self._held_from = held, self.position
        self._block = min(self._block * 2, LARGEST_BLOCK) if time.monotonic() - began < _SOON else self._first
