"""Cache entries: one safetensors file each, named by its key, written aside and renamed, checked when read."""

from __future__ import annotations

import errno
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from vtrain.contract import DataError, Problem
from vtrain.data.keys import FORMAT
from vtrain.data.packing import Bytes, Packed, from_bytes, from_words, pack, unpack, words

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("text", "video")
SUFFIX, PART, DAMAGED = ".safetensors", ".part", ".damaged"
"""Of an entry; of one being written, or left by a process that was killed; of one that was found damaged."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LONGEST_HEADER = 4096
_BLOCK = 4096
_STAMP = "vtrain"
"""The metadata's one key; its value is "<format> <key> <checksum>", and a word for each tensor that is compressed."""
_UNSIGNED = "0" * 8


@dataclass(frozen=True, slots=True)
class _Header:
    """text: as it lies in the file, after its length. tensors: name -> type, shape, first byte, end. stamp: its words."""

    text: bytes
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]
    stamp: tuple[str, ...]

    @classmethod
    def read(cls, stream: IO[bytes]) -> _Header:
        """From the start of a file. Raises OSError or ValueError."""
        data = stream.read(8 + _LONGEST_HEADER)
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > len(data) - 8:
            raise ValueError("it is cut short, or no safetensors file")
        text = data[8 : 8 + length]
        try:
            return cls._parse(text)
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError("its header is none") from error

    @classmethod
    def _parse(cls, text: bytes) -> _Header:
        header = json.loads(text)
        stamp = header.pop("__metadata__")[_STAMP].split(" ")
        tensors = {}
        for name, tensor in header.items():
            begin, end = map(int, tensor["data_offsets"])
            each = Packed(tensor["dtype"], tuple(map(int, tensor["shape"])), shuffled=False)
            if not 0 <= begin <= end or end - begin != each.nbytes:
                raise ValueError("its header contradicts itself")
            tensors[name] = (each.dtype, each.shape, begin, end)
        return cls(text, tensors, tuple(stamp))

    @property
    def start(self) -> int:
        """Where the numbers start in the file."""
        return 8 + len(self.text)

    @property
    def length(self) -> int:
        """Of the whole file."""
        return self.start + max((end for *_, end in self.tensors.values()), default=0)

    def is_of(self, key: str) -> bool:
        return len(self.stamp) >= 3 and self.stamp[:2] == (FORMAT, key)

    def checksum(self, numbers: Bytes) -> str:
        """Of the header, its own checksum unsigned, and the numbers."""
        signed = f"{self.stamp[1]} {self.stamp[2]}".encode()
        return checksum(self.text.replace(signed, f"{self.stamp[1]} {_UNSIGNED}".encode(), 1), numbers)


def checksum(header: bytes, numbers: Bytes) -> str:
    """CRC-32 of the header, of the 64-bit sum of each block of 4 KiB, and of what is left: at the speed of the memory.

    A flipped bit, a torn, zeroed or misplaced block are found; words that changed places within a block are not.
    """
    whole = len(numbers) // _BLOCK * _BLOCK
    sums = numbers[:whole].view("<u8").reshape(-1, _BLOCK // 8).sum(axis=1, dtype=np.uint64)
    return f"{zlib.crc32(numbers[whole:].data, zlib.crc32(sums.data, zlib.crc32(header))):08x}"


class Entries:
    """The entries of one kind ("text", "video") in a cache folder. compress: whether those written from now on are."""

    def __init__(self, folder: Path, kind: str, *, compress: bool = False) -> None:
        self.folder, self.compress = folder / kind, compress

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def sound(self, key: str) -> bool:
        """Whether the entry is there, whole and its own: its header and length are looked at, not its numbers."""
        try:
            with self.path(key).open("rb", buffering=0) as stream:  # so that no more than the header is read
                header = _Header.read(stream)
                return header.is_of(key) and header.length == os.fstat(stream.fileno()).st_size
        except (OSError, ValueError):
            return False

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors. Raises DataError if the entry is missing or damaged; a damaged one is moved aside."""
        path = self.path(key)
        try:
            return _tensors(*_load(path, key))
        except OSError as error:
            what = f"the cache entry cannot be read: {error.strerror or error}."
            raise DataError(Problem(str(path), what, "Start the run again: it will be encoded.")) from error
        except ValueError as error:
            aside = set_aside(path)
            what = f"the cache entry is damaged ({error}) and was moved to {aside.name}."
            raise DataError(Problem(str(path), what, "Start the run again: it will be encoded anew.")) from error

    def damage(self, key: str) -> str | None:
        """What is wrong with an entry, all its bytes read, or None. Raises OSError if it cannot be read."""
        try:
            header, data = _load(self.path(key), key)
            if len(header.stamp) > 3:
                _tensors(header, data)
        except ValueError as error:
            return str(error)
        return None

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Put the entry in place, whole or not at all. Raises DataError if the disk is full or cannot be written."""
        path = self.path(key)
        data = _serialise(key, tensors, compress=self.compress)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{key[:16]}-{secrets.token_hex(8)}{PART}")
            try:
                with aside.open("xb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                aside.replace(path)
            except BaseException:  # also an interrupt: no half entry stays
                aside.unlink(missing_ok=True)
                raise

    def files(self) -> Iterator[Path]:
        """Every file of the kind, entry or not, in order of name. Raises DataError if a folder cannot be read."""
        try:
            for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
                yield from sorted(folder.iterdir()) if folder.is_dir() else ()
        except OSError as error:
            what = f"the cache cannot be read: {error.strerror or error}."
            raise DataError(Problem(str(self.folder), what, "Check the folder.")) from error


def set_aside(path: Path) -> Path:
    """Where a damaged entry now lies; the next filling makes it anew."""
    aside = path.with_suffix(DAMAGED)
    with suppress(OSError):
        path.replace(aside)
    return aside


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


def _load(path: Path, key: str) -> tuple[_Header, Bytes]:
    """Header and numbers of a whole entry whose checksum holds. Raises OSError or ValueError."""
    with path.open("rb") as stream:
        header = _Header.read(stream)
        length = os.fstat(stream.fileno()).st_size
        if not header.is_of(key):
            raise ValueError("its content is not what its name says")
        if header.length != length:
            raise ValueError(f"it has {length} bytes where {header.length} belong")
        data: Bytes = np.empty(length - header.start, dtype=np.uint8)
        stream.seek(header.start)
        if stream.readinto(data.data) != len(data):
            raise ValueError("it became shorter while it was read")
    if header.checksum(data) != header.stamp[2]:
        raise ValueError("its checksum does not hold")
    return header, data


def _tensors(header: _Header, data: Bytes) -> dict[str, Tensor]:
    """Raises ValueError for a compressed entry that does not unpack."""
    packed = from_words(" ".join(header.stamp[3:]))
    found = {}
    for name, (dtype, shape, begin, end) in header.tensors.items():
        part = data[begin:end]
        found[name] = unpack(packed[name], part) if name in packed else from_bytes(part, dtype, shape)
    return found


def _serialise(key: str, tensors: Mapping[str, Tensor], *, compress: bool) -> bytes:
    """safetensors bytes whose metadata hold format, key, a checksum and what is compressed."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    packed: dict[str, Packed] = {}
    if compress:
        packs = {name: pack(tensor) for name, tensor in whole.items()}
        packed = {name: what for name, (what, _) in packs.items()}
        whole = {name: data for name, (_, data) in packs.items()}
    # One text, because safetensors writes several in a random order.
    stamp = f"{FORMAT} {key} {_UNSIGNED} {words(packed)}".rstrip()
    data = save(whole, {_STAMP: stamp})
    start = 8 + int.from_bytes(data[:8], "little")
    signed = checksum(data[8:start], np.frombuffer(data, dtype=np.uint8)[start:])
    # The checksum is of fixed length, so that filling it in moves nothing.
    unsigned = f"{key} {_UNSIGNED}"
    return data[:start].replace(unsigned.encode(), f"{key} {signed}".encode(), 1) + data[start:]
