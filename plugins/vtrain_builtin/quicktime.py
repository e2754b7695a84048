"""A QuickTime file around images that lie elsewhere: its header alone, made from their sizes.

Not by PyAV: its muxer writes the version of FFmpeg into the header ("Lavf62.12.102"). The header is hashed with the images, so
an update of PyAV would make every cached clip another.

Boxes as in ISO/IEC 14496-12 and Apple's QuickTime File Format. All images are one chunk, so that the file is this header
and then the images as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction

CODECS = {".png": b"png ", ".jpg": b"jpeg", ".jpeg": b"jpeg", ".tif": b"tiff", ".tiff": b"tiff"}
"""Suffix -> name of the codec in the file."""

_UNIT = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
"""The display matrix that changes nothing."""


def header(codec: bytes, sizes: Sequence[int], fps: Fraction) -> bytes:
    """Everything before the images' bytes. sizes: of the images; the picture's size is left to the decoder."""
    scale, step = fps.numerator, fps.denominator
    length = len(sizes) * step
    start = _box(b"ftyp", b"qt  ", struct.pack(">I", 0), b"qt  ")
    data = struct.pack(">I4sQ", 1, b"mdat", 16 + sum(sizes))
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
