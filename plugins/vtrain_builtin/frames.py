"""Data backend "frames": below a local folder, every folder that holds numbered images is one clip.

A clip's bytes are a QuickTime file whose samples are the images as they are: its header is made from their sizes alone, they are
read when they are asked for, and nothing is copied or written. The header is not PyAV's, though its muxer can be given packets
without content: what it writes names the version of FFmpeg ("Lavf62.12.102"), the header is hashed with the images, and so an
update of PyAV would make every cached clip another; it writes the header after the images, and takes 95 ms where this takes 0.1,
for 1,000 images of 1.5 MB, at each listing.

Boxes as in ISO/IEC 14496-12 and Apple's QuickTime File Format. All images are one chunk, so that the file is this header
and then the images as they are.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import Field

from vtrain.contract import DataBackend, DataBackendSpec, DataError, LocalPath, Options, Problem, SourceRef
from vtrain_builtin.folder import LocalFolder, is_folder, open_plain
from vtrain_builtin.seekable import SizedFile

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIX = ".mov"
"""Of a clip's id: the folder's name with it, so that "shot_01" is the clip "shot_01.mov", its caption "shot_01.txt"."""

_NUMBERED = re.compile(
    r"(?!\.)(?P<name>.*?)(?P<number>[0-9]+)(?P<suffix>\.(?:png|jpe?g|tiff?|bmp|webp))", re.IGNORECASE | re.DOTALL
)

CODECS = {".png": b"png ", ".jpg": b"jpeg", ".jpeg": b"jpeg", ".tif": b"tiff", ".tiff": b"tiff"}
"""Suffix -> name of the codec in the file."""

_UNIT = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
"""The display matrix that changes nothing."""


class FramesOptions(Options):
    """Options of the "frames" backend."""

    path: LocalPath = Field(description="folder of this machine below which the folders of images are")
    fps: float = Field(gt=0, le=1000, description="images a second, the same for all clips")


@dataclass(frozen=True)
class _Image:
    number: int
    name: str
    form: tuple[str, str]
    """What all images of a clip have in common: the name before the number, and the codec's name."""

    size: int
    changed: int


class FramesFolder:
    """Folders of images as clips; all other files are listed as they are. location: absolute path and rate."""

    def __init__(self, options: FramesOptions) -> None:
        self._root = str(options.path)
        self._local = LocalFolder(self._root)
        self._fps = Fraction(options.fps).limit_denominator(1001)  # 30000 / 1001 comes back exactly
        self.location = f"{self._root} (frames at {self._fps})"

    def refs(self) -> Iterator[SourceRef]:
        """One folder, and the images of one clip, are held at a time. Raises DataError."""
        self._local.check("the folders of images")
        levels, before = [self._local.level(self._names(""))], ""
        while levels:
            name = next(levels[-1], None)
            if name is None:
                levels.pop()
            elif name.endswith("/"):
                if not self._local.leads_back(name):
                    levels.append(self._local.level(self._names(name)))
            else:
                if name.rstrip("\0") == before:
                    what = "is a file beside a folder of images: both would be the same clip."
                    raise DataError(Problem(f"{self._root}/{before}", what, "Rename the file or the folder."))
                before = name.rstrip("\0")
                yield self._clip(before) if name.endswith("\0") else self._local.ref(name)

    def open(self, ref: SourceRef) -> BinaryIO:
        """Raises OSError for images that are not one clip: of several kinds, or with numbers missing."""
        if not ref.version.startswith("frames "):
            return open_plain(Path(f"{self._root}/{ref.id}"))
        folder = self._folder(ref.id)
        images = self._images(folder)
        codec = _agreed(images)
        paths = [f"{self._root}/{folder}{image.name}" for image in images]
        sizes = [image.size for image in images]
        return io.BufferedReader(Joined(header(codec, sizes, self._fps), paths, sizes), 1 << 16)

    def _names(self, folder: str) -> Iterator[str]:
        """In a folder, from the root: folders end in "/", clips in NUL."""
        # NUL marks a clip: no file's name holds it, and it sorts first, so that the clip stands where its name does.
        if not folder and self._holds_images(""):
            yield f"{self._clip_of_root}\0"
        with os.scandir(f"{self._root}/{folder}") as entries:
            for entry in entries:
                name = folder + entry.name
                if is_folder(entry):
                    yield f"{name}/"
                    if self._holds_images(f"{name}/"):
                        yield f"{name}{SUFFIX}\0"
                elif not _NUMBERED.fullmatch(entry.name):
                    yield name

    @property
    def _clip_of_root(self) -> str:
        return Path(self._root).name + SUFFIX

    def _holds_images(self, folder: str) -> bool:
        with os.scandir(f"{self._root}/{folder}") as entries:
            return any(_NUMBERED.fullmatch(entry.name) and not is_folder(entry) for entry in entries)

    def _folder(self, clip: str) -> str:
        folder = f"{clip.removesuffix(SUFFIX)}/"
        inside = os.path.isdir(f"{self._root}/{folder}") and self._holds_images(folder)  # noqa: PTH112
        return folder if inside or clip != self._clip_of_root else ""

    def _clip(self, name: str) -> SourceRef:
        """Its version names the rate and, as a hash, every image with its size and time of change."""
        images = self._images(self._folder(name))
        seen = hashlib.blake2b(digest_size=16)
        for image in images:
            seen.update(f"{image.name}/{image.size}/{image.changed}\0".encode(errors="surrogateescape"))
        sizes = [image.size for image in images]
        # Whichever codec it is: all their names are of four bytes.
        size = sum(sizes) + len(header(b"png ", sizes, self._fps))
        return SourceRef(name, size, f"frames {self._fps} {seen.hexdigest()}")

    def _images(self, folder: str) -> list[_Image]:
        """Sorted by number."""
        images = []
        with os.scandir(f"{self._root}/{folder}") as entries:
            for entry in entries:
                if (match := _NUMBERED.fullmatch(entry.name)) is None or is_folder(entry):
                    continue
                codec = CODECS.get(match["suffix"].lower(), b"").decode()
                form = match["name"], codec or match["suffix"].lower()
                try:
                    status = entry.stat()
                    size, changed = status.st_size, status.st_mtime_ns
                except OSError:  # a link to nothing: opening it says so
                    size, changed = 0, 0
                images.append(_Image(int(match["number"]), entry.name, form, size, changed))
        return sorted(images, key=lambda image: (image.number, image.name))


def _agreed(images: Sequence[_Image]) -> bytes:
    """The codec of all. Raises OSError if they are not the frames of one clip."""
    kinds = {image.form: image.name for image in images}
    if len(kinds) > 1:
        first, second, *_ = sorted(kinds.values())
        raise OSError(f"the folder holds more than one series of images ({first}, {second})")
    if not images:
        raise OSError("the folder holds no numbered images any more")
    for before, image in pairwise(images):
        if image.number == before.number:
            raise OSError(f"two images have the number {image.number}: {before.name}, {image.name}")
        if image.number > before.number + 1:
            raise OSError(f"images are missing between {before.name} and {image.name}")
    _, codec = images[0].form
    if codec.startswith("."):
        raise OSError(f"series of {codec} images are not read: save them as png, jpg or tiff")
    return codec.encode()


class Joined(SizedFile):
    """Bytes, and files one after the other, as one file. A file that is not as long as it was raises OSError."""

    def __init__(self, head: bytes, paths: Sequence[str], sizes: Sequence[int]) -> None:
        self._head, self._paths = head, paths
        self._ends = list(accumulate(sizes, initial=len(head)))
        super().__init__(self._ends[-1])
        self._open: tuple[int, BinaryIO] | None = None

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Up to the end of one part."""
        view = memoryview(buffer).cast("B")
        part = bisect_right(self._ends, self.position)
        if part == len(self._ends):
            return 0
        data = self._head[self.position : self.position + len(view)] if part == 0 else self._image(part - 1, len(view))
        view[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
        super().close()

    def _image(self, number: int, most: int) -> bytes:
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
            self._open = number, open_plain(Path(self._paths[number]))
        stream = self._open[1]
        stream.seek(self.position - self._ends[number])
        data = stream.read(min(most, self._ends[number + 1] - self.position))
        if not data or os.fstat(stream.fileno()).st_size != self._ends[number + 1] - self._ends[number]:
            raise OSError(f"{self._paths[number]} changed while it was read")
        return data


def header(codec: bytes, sizes: Sequence[int], fps: Fraction) -> bytes:
    """Everything before the images' bytes. sizes: of the images; the picture's size is left to the decoder."""
    scale, step = fps.numerator, fps.denominator
    length = len(sizes) * step
    start = _box(b"ftyp", b"qt  ", struct.pack(">I", 0), b"qt  ")
    data = struct.pack(">I4sQ", 1, b"mdat", 16 + sum(sizes))  # 1: the length stands behind, in 64 bits
    # Of fixed width in the header, so that its own value does not move it.
    offset = len(start) + len(_moov(codec, sizes, scale, step, length, 0)) + len(data)
    return start + _moov(codec, sizes, scale, step, length, offset) + data


def _moov(codec: bytes, sizes: Sequence[int], scale: int, step: int, length: int, offset: int) -> bytes:
    time = struct.pack(">QQIQ", 0, 0, scale, length)
    movie = _full(b"mvhd", 1, 0, time, struct.pack(">IH10x", 1 << 16, 1 << 8), _UNIT, bytes(24), struct.pack(">I", 2))
    track = _full(b"tkhd", 1, 3, struct.pack(">QQIIQ", 0, 0, 1, 0, length), bytes(16), _UNIT, bytes(8))
    media = _box(
        b"mdia",
        _full(b"mdhd", 1, 0, time, struct.pack(">HH", 0x55C4, 0)),
        _full(b"hdlr", 0, 0, b"mhlrvide", bytes(13)),
        _box(b"minf", _full(b"vmhd", 0, 1, bytes(8)), _references(), _table(codec, sizes, step, offset)),
    )
    return _box(b"moov", movie, _box(b"trak", track, media))


def _references() -> bytes:
    """The images are in this file."""
    return _box(b"dinf", _full(b"dref", 0, 0, struct.pack(">I", 1), _full(b"url ", 0, 1)))


def _table(codec: bytes, sizes: Sequence[int], step: int, offset: int) -> bytes:
    """Every image is a sample of the same length and a key frame."""
    count = len(sizes)
    entry = struct.pack(">6xH16xHHIII", 1, 0, 0, 72 << 16, 72 << 16, 0) + struct.pack(">H32xHh", 1, 24, -1)
    return _box(
        b"stbl",
        _full(b"stsd", 0, 0, struct.pack(">I", 1), _box(codec, entry)),
        _full(b"stts", 0, 0, struct.pack(">III", 1, count, step)),
        _full(b"stsc", 0, 0, struct.pack(">IIII", 1, 1, count, 1)),
        _full(b"stsz", 0, 0, struct.pack(f">II{count}I", 0, count, *sizes)),
        _full(b"co64", 0, 0, struct.pack(">IQ", 1, offset)),
    )


def _full(name: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return _box(name, struct.pack(">I", version << 24 | flags), *parts)


def _box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def _build(options: Any) -> DataBackend:
    return FramesFolder(options)


FRAMES = DataBackendSpec(
    name="frames",
    summary="folders of numbered images (png, jpg, tiff), each one clip, and captions beside them",
    options=FramesOptions,
    build=_build,
)
