"""Opening a file as a video, its frames' times on the screen, and what it holds where it is none."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, TypeVar

if TYPE_CHECKING:
    from av import FFmpegError
    from av.container import InputContainer
    from av.video.stream import VideoStream


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
    if cut and kinds[-1] == b"moof":
        return "the file ends within a fragment (moof): an unfinished download or recording?"
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


SLACK = 0.00125
"""Seconds: twice Matroska's rounding (of the first frame and of another), and a little."""

FrameT = TypeVar("FrameT")


def available_frames(duration: float, fps: float) -> int:
    """How many output frames start before the source ends, `duration` seconds after its first frame."""
    return max(0, math.ceil((duration - SLACK) * fps))


def on_screen(frames: Iterable[tuple[float, float, FrameT]], times: Sequence[float]) -> Iterator[FrameT]:
    """The frame on screen at each of `times` (ascending).

    frames: (time, duration, frame) in order of time. Yields fewer than len(times) if the source ends before the last,
    and nothing if the first frame comes after times[0].
    """
    done, shown, end = 0, None, -math.inf
    for time, duration, frame in frames:
        if shown is None and time - SLACK > times[0]:
            return
        while shown is not None and done < len(times) and times[done] < time - SLACK:
            yield shown
            done += 1
        if done == len(times):
            return
        shown, end = frame, time + duration
    while shown is not None and done < len(times) and times[done] < end:
        yield shown
        done += 1


SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2v", ".ts", ".m2ts", ".mts", ".wmv",
     ".flv", ".ogv", ".gif", ".apng")
)  # fmt: skip
"""Lower-case suffixes of files that are taken for videos."""

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"))
"""Lower-case suffixes of files that are taken for clips of one frame where data.images is true."""

# Only formats that hold their own pictures: a playlist renamed to .mp4 must not make ffmpeg open other files.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,gif,nut,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,apng"
)

MOST_PIXELS = 1 << 26
"""Of a picture that is decoded (8192x8192): a small file may claim any size."""

_HDR = {16: "PQ", 18: "HLG"}
"""ITU-T H.273 transfer characteristics of high dynamic range."""

_STRICT = ("mjpeg", "png", "apng", "webp", "bmp")
"""Codecs that give half a picture of half a file unless told not to; the others mark a frame that they mended."""

_DOLBY = ("dvh1", "dvhe", "dva1", "dvav", "dav1")
"""Codec tags of Dolby Vision without a base layer that others can show."""

_BUFFER = 1 << 20


class FileFault(Exception):
    """A file that cannot be used, with the reason in one sentence.

    lasting: true while the file stays as it is; false if reading it may succeed at another time.
    """

    def __init__(self, reason: str, *, lasting: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


@contextmanager
def faults(doing: str, stream: BinaryIO | None = None) -> Iterator[None]:
    """Turn what PyAV and the storage raise into FileFault. stream: of a file whose bytes may tell why ffmpeg refuses it."""
    try:
        yield
    # Before OSError: some of PyAV's errors are both, and what ffmpeg says of a file lasts.
    except _ffmpeg_error() as error:
        found = _described(stream) if stream is not None else ""
        raise FileFault(f"{doing}: {f'{found} (ffmpeg: {error.strerror})' if found else error.strerror}") from error
    except OSError as error:
        raise FileFault(f"{doing}: {error.strerror or error}", lasting=False) from error


def _described(stream: BinaryIO) -> str:
    """What the file holds, "" if that is not known or it cannot be read again."""
    try:
        return described(stream)
    except OSError:
        return ""


def _ffmpeg_error() -> type[FFmpegError]:
    from av import FFmpegError

    return FFmpegError


@contextmanager
def open_video(stream: BinaryIO, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream that is not a cover picture. Raises FileFault."""
    import av
    from av.stream import Disposition

    with faults("cannot be read as a video", stream):
        options = {"format_whitelist": _FORMATS, "max_pixels": str(MOST_PIXELS)}
        # replace: a title that is not UTF-8 is no reason to refuse the film, as PyAV would.
        container = av.open(stream, "r", options=options, metadata_errors="replace", buffer_size=_BUFFER)
    with container:
        moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not moving:
            if any(s.type == "audio" for s in container.streams):
                raise FileFault("holds no video, only sound")
            raise FileFault(f"holds no video: {_described(stream) or 'is it truncated?'}")
        video = moving[0]
        if video.codec_context is None:
            raise FileFault("its codec is unknown to this build of ffmpeg")
        # What the header claims; the decoder's own limit, below, is for frames that say otherwise.
        if video.codec_context.width * video.codec_context.height > MOST_PIXELS:
            size = f"{video.codec_context.width}x{video.codec_context.height}"
            raise FileFault(f"claims a picture of {size}; at most {MOST_PIXELS} pixels are decoded")
        refuse_hdr(video.color_trc, video.codec_context.codec_tag)
        strict = {"err_detect": "explode"} if video.codec_context.name in _STRICT else {}
        video.codec_context.options = {"max_pixels": str(MOST_PIXELS), **strict}
        video.codec_context.thread_count = threads
        yield container, video


def refuse_hdr(transfer: int, tag: str = "") -> None:
    """Raises FileFault for high dynamic range. transfer: of H.273; tag: the codec's in the container."""
    name = "Dolby Vision" if tag in _DOLBY else _HDR.get(transfer)
    if name is not None:
        raise FileFault(f"is in high dynamic range ({name}); convert it to standard range (BT.709) first")
