"""Opening a video file with PyAV: which stream, within which bounds, and every way to fail as one kind of error.

PyAV is imported by what opens a file: a scan of files that are all known opens none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from vtrain.data.decoding.contents import described

if TYPE_CHECKING:
    from av import FFmpegError
    from av.container import InputContainer
    from av.video.stream import VideoStream

SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2v", ".ts", ".m2ts", ".mts", ".wmv",
     ".flv", ".ogv", ".gif")
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
