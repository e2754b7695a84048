"""Entries of the cache: files named by a hash of all that decides over their content, written aside, renamed, checked."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vtrain.contract import Caption, DataError, Problem, Role, TokenGrid
from vtrain.contract.weights import parse_header
from vtrain.data.caching.packing import Bytes, Packed, bytes_of, dtype_names, from_words, pack, unpack, words
from vtrain.data.sample import MASK_VERSION, TRANSFORM_VERSION, MaskGrid, Sample

if TYPE_CHECKING:
    from torch import Tensor


FORMAT = "vtrain-cache-3"
"""Layout of an entry, in its name and in its metadata."""


def text_key(caption: Caption, role: Role, fingerprint: str) -> str:
    """fingerprint: of the text encoder."""
    return _key("text", fingerprint, role, caption.text, sorted(caption.extras.items()))


def transform(decoder: str) -> int | str:
    """Version of how pixels are made. decoder: of the dataset's plan; what another one makes are other pixels."""
    # PyAV's keys do not name it: entries from before there was a choice keep theirs.
    return f"{TRANSFORM_VERSION}, {decoder}" if decoder else TRANSFORM_VERSION


def video_key(content: str, sample: Sample, start: float, transform: int | str, fingerprint: str, *, std: bool) -> str:
    """content: SHA-256 of the source's bytes. start: of the window. fingerprint: the family's, of its video codec.

    std: whether the entry holds the std beside the mean.
    """
    return _key("video", fingerprint, content, transform, _window(sample, start), sample.box, *(["std"] if std else []))


def features_key(
    content: str,
    sample: Sample,
    start: float,
    transform: int | str,
    name: str,
    fingerprint: str,
    grid: TokenGrid,
    frames: Sequence[int],
) -> str:
    """name, fingerprint: of the regularizer and its encoder. grid: of the clip's tokens; frames: that stand for these."""
    window = _window(sample, start)
    return _key("features", name, fingerprint, content, transform, window, sample.box, grid, list(frames))


def mask_key(content: str, sample: Sample, start: float, grid: MaskGrid) -> str:
    """content: SHA-256 of the mask's bytes. The box is a part of the clip's picture, whatever the mask's own size."""
    spans = [[span.start, span.stop] for span in grid.spans]
    picture = [sample.picture, sample.box]
    return _key("mask", content, MASK_VERSION, _window(sample, start), picture, spans, grid.height, grid.width)


def _window(sample: Sample, start: float) -> list[float]:
    return [start, sample.fps, *sample.shape]


def _key(*parts: object) -> str:
    """SHA-256 of canonical JSON."""
    text = json.dumps([FORMAT, *parts], ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


KINDS = ("text", "video", "features", "mask")
SUFFIX, PART, DAMAGED = ".safetensors", ".part", ".damaged"
"""Of an entry; of one being written, or left by a process that was killed; of one that was found damaged."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_LONGEST_HEADER = 4096
_BLOCK, _PART = 4096, 1 << 20
"""Bytes that are summed as one; bytes that are read at once, so that they are still near when they are summed."""
_STAMP = "vtrain"
"""The metadata's one key; its value is "<format> <key> <checksum>", and a word for each tensor that is compressed."""
_UNSIGNED = "0" * 8


@dataclass(frozen=True, slots=True)
class _Header:
    """text: as it lies in the file, after its length. tensors: in their order in the file; size: bytes of all of them.

    stamp: its words.
    """

    text: bytes
    tensors: Mapping[str, Packed]
    size: int
    stamp: tuple[str, ...]

    @classmethod
    def read(cls, file: int) -> _Header:
        """From the start of a file, given by its descriptor. Raises OSError or ValueError."""
        data = os.read(file, 8 + _LONGEST_HEADER)  # one call: headers of entries are short
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > len(data) - 8:
            raise ValueError("it is cut short, or no safetensors file")
        text = data[8 : 8 + length]
        try:
            return cls.parse(text)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("its header is none") from error

    @classmethod
    def parse(cls, text: bytes) -> _Header:
        """Raises ValueError, KeyError, TypeError or AttributeError for what is none."""
        found, metadata = parse_header(text)
        stamp = metadata[_STAMP].split(" ")
        tensors, at = {}, 0
        for name, tensor in found.items():
            each = Packed(tensor.dtype, tensor.shape, shuffled=False)
            if tensor.begin != at or tensor.end - tensor.begin != each.nbytes:
                raise ValueError("its header contradicts itself")
            tensors[name], at = each, tensor.end
        return cls(text, tensors, at, tuple(stamp))

    @property
    def start(self) -> int:
        """Where the numbers start in the file."""
        return 8 + len(self.text)

    @property
    def length(self) -> int:
        """Of the whole file."""
        return self.start + self.size

    def is_of(self, key: str) -> bool:
        return len(self.stamp) >= 3 and self.stamp[:2] == (FORMAT, key)

    def packed(self) -> Mapping[str, Packed]:
        """What the compressed ones were. Raises ValueError."""
        return from_words(" ".join(self.stamp[3:])) if len(self.stamp) > 3 else {}

    def unsigned(self) -> bytes:
        """The text before the checksum was filled in."""
        signed = f"{self.stamp[1]} {self.stamp[2]}".encode()
        return self.text.replace(signed, f"{self.stamp[1]} {_UNSIGNED}".encode(), 1)


def checksum(crc: int, numbers: Bytes) -> int:
    """CRC-32, going on from `crc`, of the 64-bit sum of each block of 4 KiB and of what is left: at the speed of memory.

    A flipped bit, a torn, zeroed or misplaced block are found; words that changed places within a block are not.
    """
    whole = len(numbers) // _BLOCK * _BLOCK
    if whole:
        sums = np.add.reduce(numbers[:whole].view("<u8").reshape(-1, _BLOCK // 8), axis=1)
        crc = zlib.crc32(sums.data, crc)
    return zlib.crc32(numbers[whole:].data, crc)


class _Checked:
    """Which files this process found sound by their checksum, as far as it remembers: a table of fixed size.

    A file is known by its name, inode, size and time of change. What lies in another's slot is checked again.
    """

    _SLOTS = 1 << 17

    def __init__(self) -> None:
        self._table = array("q", bytes(8 * self._SLOTS))

    def knows(self, mark: int) -> bool:
        return self._table[mark % self._SLOTS] == mark

    def remember(self, mark: int) -> None:
        self._table[mark % self._SLOTS] = mark


class Entries:
    """The entries of one of KINDS in a cache folder. compress: whether those written from now on are."""

    def __init__(self, folder: Path, kind: str, *, compress: bool = False) -> None:
        self.kind, self.folder, self.compress = kind, folder / kind, compress
        self._folder, self._checked = str(self.folder), _Checked()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def sound(self, key: str) -> bool:
        """Whether the entry is there, whole and its own: its header and length are scanned, not its numbers."""
        return self.layout(key) is not None

    def layout(self, key: str) -> Mapping[str, Packed] | None:
        """The tensors of an entry that is sound, as they are once unpacked; None of any other."""
        try:
            with _opened(self._name(key)) as file:
                header = _Header.read(file)
                if not header.is_of(key) or header.length != os.fstat(file).st_size:
                    return None
                return {**header.tensors, **header.packed()}
        except (OSError, ValueError):
            return None

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors. Raises DataError if the entry is missing or damaged; a damaged one is moved aside."""
        return {name: tensor[0] for name, tensor in self.read_all([key]).items()}

    def read_all(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of several entries of one layout, each name's stacked. Raises DataError like `read`.

        A checksum is looked at when this process reads a file for the first time, and again whenever the file changed.
        """
        stacked: dict[str, Tensor] = {}
        for number, key in enumerate(keys):
            try:
                with _opened(self._name(key)) as file:
                    header, mark = _whole(file, key)
                    stacked = stacked or _empty(header, len(keys))
                    parts = {name: tensor[number] for name, tensor in stacked.items()}
                    _read_into(parts, header, file, check=not self._checked.knows(mark))
                    self._checked.remember(mark)
            except OSError as error:
                what = f"the cache entry cannot be read: {error.strerror or error}."
                raise DataError(Problem(self._name(key), what, "Start the run again: it will be encoded.")) from error
            except ValueError as error:
                aside = set_aside(self.path(key))
                what = f"the cache entry is damaged ({error}) and was moved to {aside.name}."
                raise DataError(
                    Problem(self._name(key), what, "Start the run again: it will be encoded again.")
                ) from error
        return stacked

    def damage(self, key: str) -> str | None:
        """What is wrong with an entry, all its bytes read, or None. Raises OSError if it cannot be read."""
        try:
            with _opened(self._name(key)) as file:
                header, _ = _whole(file, key)
                _read_into({name: part[0] for name, part in _empty(header, 1).items()}, header, file, check=True)
        except ValueError as error:
            return str(error)
        return None

    def _name(self, key: str) -> str:
        """The path as text: to make a Path takes as long as to read a small entry."""
        return f"{self._folder}/{key[:2]}/{key}{SUFFIX}"

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Put the entry in place, whole or not at all. Raises DataError if the disk is full or cannot be written."""
        path = self.path(key)
        data = _serialise(key, tensors, compress=self.compress)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not mkstemp, whose files only their owner may read: a cache folder may be shared.
            aside = path.with_name(f".{key[:16]}-{secrets.token_hex(8)}{PART}")
            try:
                with aside.open("xb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())  # before the rename, which may reach the disk first
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
    """Where a damaged entry now lies; the next filling makes it again."""
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


@contextmanager
def _opened(name: str) -> Iterator[int]:
    file = os.open(name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        yield file
    finally:
        os.close(file)


def _whole(file: int, key: str) -> tuple[_Header, int]:
    """The header of an entry of that key that has all its bytes, and what marks the file. Raises OSError or ValueError."""
    header = _Header.read(file)
    state = os.fstat(file)
    length = state.st_size
    if not header.is_of(key):
        raise ValueError("its content is not what its name says")
    if header.length != length:
        raise ValueError(f"it has {length} bytes where {header.length} belong")
    # With the inode's own time of change: that of the content can be set back.
    return header, hash((key, state.st_dev, state.st_ino, length, state.st_mtime_ns, state.st_ctime_ns))


def _empty(header: _Header, count: int) -> dict[str, Tensor]:
    """Room for the tensors of so many entries of this layout."""
    import torch

    packed, types = header.packed(), dtype_names()
    return {
        name: torch.empty((count, *what.shape), dtype=types[what.dtype])
        for name, what in ((name, packed.get(name, stored)) for name, stored in header.tensors.items())
    }


def _read_into(parts: Mapping[str, Tensor], header: _Header, file: int, *, check: bool) -> None:
    """Read the numbers into tensors. Raises OSError, or ValueError for what is damaged or has another layout.

    check: whether the checksum is looked at.
    """
    packed = header.packed()
    crc, at = zlib.crc32(header.unsigned()), header.start
    for name, stored in header.tensors.items():
        part, what = parts.get(name), packed.get(name, stored)
        if part is None or (tuple(part.shape), part.dtype) != (what.shape, dtype_names()[what.dtype]):
            raise ValueError("its tensors are of another shape than those of its bucket")
        data = np.empty(stored.nbytes, dtype=np.uint8) if name in packed else bytes_of(part)
        for begin in range(0, len(data), _PART):
            piece = data[begin : begin + _PART]
            # Into the batch's own memory: nothing is copied once more.
            if os.preadv(file, [piece.data], at + begin) != len(piece):
                raise ValueError("it became shorter while it was read")
            crc = checksum(crc, piece) if check else crc
        if name in packed:
            part.copy_(unpack(what, data))
        at += len(data)
    if check and f"{crc:08x}" != header.stamp[2]:
        raise ValueError("its checksum does not hold")


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
    header = _Header.parse(data[8:start])
    crc, at = zlib.crc32(header.text), start
    for tensor in header.tensors.values():
        crc, at = checksum(crc, np.frombuffer(data, np.uint8, tensor.nbytes, at)), at + tensor.nbytes
    # The checksum is of fixed length, so that filling it in moves nothing.
    unsigned = f"{key} {_UNSIGNED}"
    return data[:start].replace(unsigned.encode(), f"{key} {crc:08x}".encode(), 1) + data[start:]
