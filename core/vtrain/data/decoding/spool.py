"""Reading a file's bytes once: for its content hash, and for decoding, which seeks."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from vtrain.data.decoding.video import FileFault, faults

IN_MEMORY = 64 << 20
"""Bytes of a remote file that are kept in memory; one that is longer goes to the folder for temporary files."""

MOST = 32 << 30
"""Bytes of the longest remote file that is taken."""

_CHUNK = 1 << 20


@contextmanager
def hashed(stream: BinaryIO, most: int = MOST) -> Iterator[tuple[str, BinaryIO]]:
    """SHA-256 of all its bytes, and a file with the same bytes from their start. Raises FileFault.

    A local file is read once and rewound (its pages are then in memory); if it changes before the block ends, that is
    a fault. Others are spooled, so that nothing is fetched twice.
    """
    if is_local(stream):
        before = _state(stream)
        yield _sha256(stream), stream
        if _state(stream) != before:
            raise FileFault("changed while it was read", lasting=False)
        return
    with cast("BinaryIO", tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)) as copy:
        digest, length = hashlib.sha256(), 0
        with faults("cannot be fetched"):
            while chunk := stream.read(_CHUNK):
                length += len(chunk)
                if length > most:
                    raise FileFault(f"is longer than the {most / (1 << 30):g} GiB that are fetched of a remote file")
                digest.update(chunk)
                copy.write(chunk)
            copy.seek(0)
        yield digest.hexdigest(), copy


def is_local(stream: BinaryIO) -> bool:
    """Whether this is a plain file of this machine, whose descriptor gives all its bytes."""
    return isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO)


def _sha256(stream: BinaryIO) -> str:
    with faults("cannot be read"):
        digest = hashlib.file_digest(cast("io.BufferedReader", stream), "sha256")
        stream.seek(0)
    return digest.hexdigest()


def _state(stream: BinaryIO) -> tuple[int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns
