"""What a file that ffmpeg cannot read holds instead of a video, from its first bytes and, of MP4, the heads of its boxes."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

_HEAD = 1024
_MOST_BOXES = 64
"""That are looked at: each may be a request to a storage."""

_BEGINNINGS = (
    (b"PK\3\4", "it is a zip archive, to be unpacked"),
    (b"\x1f\x8b", "it is a gzip file, to be unpacked"),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7z archive, to be unpacked"),
    (b"Rar!\x1a\x07", "it is a rar archive, to be unpacked"),
    (b"%PDF-", "it is a PDF document"),
    (b"ID3", "it is sound (MP3)"),
    (b"fLaC", "it is sound (FLAC)"),
    (b"version https://git-lfs.github.com/", "it is a pointer of Git LFS, and the file itself was not fetched: git lfs pull"),
    (b"#EXTM3U", "it is a playlist (HLS), not the video"),
)  # fmt: skip
_PICTURES = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"avif": "AVIF"}
_BOXES = frozenset(
    (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"uuid", b"udta", b"meta")
)
_LONG_HEAD = 16


def described(stream: BinaryIO) -> str:
    """In words; "" if nothing is known of it. Raises OSError."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(_HEAD)
    if size == 0:
        return "it is empty (0 bytes)"
    if not any(head):
        return "it begins with zeros: an unfinished download or copy?"
    for beginning, words in _BEGINNINGS:
        if head.startswith(beginning):
            return words
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return "it is sound (WAV)"
    if head[4:8] in _BOXES:
        return _of_boxes(stream, size, head)
    return _of_text(head, whole=size <= len(head))


def _of_text(head: bytes, *, whole: bool) -> str:
    """What sort of text, if it is one."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if whole or error.start < len(head) - 4:  # otherwise only a letter that the end of `head` cuts
            return ""
        text = head[: error.start].decode("utf-8-sig")
    if any(not (letter.isprintable() or letter.isspace()) for letter in text):
        return ""
    start = text.lstrip().lower()
    if start.startswith(("<!doctype html", "<html")):
        return "it is an HTML page: a download that was refused or redirected?"
    if start.startswith("<?xml"):
        return "it is an XML text: a download that was refused?"
    return "it is a text"


def _of_boxes(stream: BinaryIO, size: int, head: bytes) -> str:
    """Of an MP4 or MOV file: what it lacks."""
    if head[4:8] == b"ftyp" and (picture := _PICTURES.get(head[8:12])):
        return f"it is a picture ({picture}), which is not read: save it as PNG or JPEG"
    kinds, end = [], 0
    for kind, end in _boxes(stream, size):  # noqa: B007 (the last one's end is wanted)
        kinds.append(kind)
    cut = end > size
    if len(kinds) == _MOST_BOXES:
        return ""
    if b"moov" not in kinds:
        if b"moof" in kinds:
            return "it is a part of a stream (moof) without its beginning (moov)"
        return (
            "the file ends before its index (moov): an unfinished download or recording?"
            if cut
            else "it has no index (moov)"
        )
    if cut and kinds[-1] == b"moov":
        return "the file ends within its index (moov): an unfinished download or recording?"
    return ""


def _boxes(stream: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """(kind, where it ends as it says) of each box of the file (ISO/IEC 14496-12, 4.2), until one reaches past its end."""
    at = 0
    for _ in range(_MOST_BOXES):
        stream.seek(at)
        head = stream.read(_LONG_HEAD)
        if len(head) < 8:
            if head:  # a head that is cut off
                yield b"", size + 1
            return
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == _LONG_HEAD:
            (length,) = struct.unpack(">Q", head[8:])
        elif length == 0:
            length = size - at  # to the end of the file
        yield kind, at + length
        if length < 8 or at + length >= size:
            return
        at += length
