"""Cache entries: one safetensors file each, named by its key, written aside and renamed, checked when read."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from vtrain.contract import DataError, Problem
from vtrain.data.keys import FORMAT

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LONGEST_HEADER = 1 << 16
_STAMP = "vtrain"
"""The metadata's one key; its value is "<format> <key> <CRC-32 of the numbers>"."""


class Entries:
    """The entries of one kind ("text", "video") in a cache folder."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder / kind

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def sound(self, key: str) -> bool:
        """Whether the entry is there, whole and its own: its header and length are looked at, not its numbers."""
        try:
            with self.path(key).open("rb") as stream:
                header, start = _header(stream.read(8 + _LONGEST_HEADER))
                length = os.fstat(stream.fileno()).st_size
        except (OSError, ValueError):
            return False
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
        return start + end == length and _is_own(header, key)

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors. Raises DataError if the entry is missing or damaged; a damaged one is moved aside."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(key)
        try:
            data = path.read_bytes()
        except OSError as error:
            what = f"the cache entry cannot be read: {error.strerror or error}."
            raise DataError(Problem(str(path), what, "Start the run again: it will be encoded.")) from error
        try:
            header, start = _header(data)
            if not _is_own(header, key, _crc(data, start)):
                raise ValueError("its content is not what its name says")
            return load(data)
        except (ValueError, SafetensorError) as error:
            aside = path.with_suffix(".damaged")
            with suppress(OSError):
                path.replace(aside)
            what = f"the cache entry is damaged ({error}) and was moved to {aside.name}."
            raise DataError(Problem(str(path), what, "Start the run again: it will be encoded anew.")) from error

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Put the entry in place, whole or not at all. Raises DataError if the disk is full or cannot be written."""
        path = self.path(key)
        data = _serialise(key, tensors)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{key[:16]}-", suffix=".part", dir=path.parent)
            aside = Path(name)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                aside.replace(path)
            except BaseException:  # also an interrupt: no half entry stays
                aside.unlink(missing_ok=True)
                raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            problem = Problem(
                str(path.parent), "the disk is full while filling the cache.", "Free space, or set cache.dir."
            )
        else:
            problem = Problem(
                str(path.parent), f"the cache cannot be written: {error.strerror or error}.", "Check the folder."
            )
        raise DataError(problem) from error


def _serialise(key: str, tensors: Mapping[str, Tensor]) -> bytes:
    """safetensors bytes whose metadata hold format, key and a checksum of the numbers."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One text, because safetensors writes several in a random order.
    metadata = {_STAMP: f"{FORMAT} {key} {'0' * 8}"}
    data = save(whole, metadata)
    _, start = _header(data)
    # The checksum is of fixed length, so that filling it in moves nothing.
    unsigned, signed = f"{key} {'0' * 8}", f"{key} {_crc(data, start)}"
    return data[:start].replace(unsigned.encode(), signed.encode(), 1) + data[start:]


def _crc(data: bytes, start: int) -> str:
    return f"{zlib.crc32(memoryview(data)[start:]):08x}"


def _header(data: bytes) -> tuple[dict[str, dict[str, Any]], int]:
    """A safetensors header and where the numbers start. Raises ValueError."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_LONGEST_HEADER, len(data) - 8):
        raise ValueError("it is cut short, or no safetensors file")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict) or not all(isinstance(value, dict) for value in header.values()):
        raise ValueError("its header is none")
    return header, 8 + length


def _is_own(header: Mapping[str, Mapping[str, Any]], key: str, crc: str = "") -> bool:
    """Whether the stamp in the metadata is this entry's, its checksum too if one is given."""
    stamp = header.get("__metadata__", {}).get(_STAMP)
    return isinstance(stamp, str) and stamp.startswith(f"{FORMAT} {key} ") and stamp.endswith(crc)
