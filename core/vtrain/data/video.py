"""Opening a video file with PyAV: which stream, which way up, and every way to fail as one kind of error.

PyAV is imported by what opens a file: a scan of files that are all known opens none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np
    from av import FFmpegError
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2v", ".ts", ".m2ts", ".mts", ".wmv",
     ".flv", ".ogv", ".gif")
)  # fmt: skip
"""Lower-case suffixes of files that are taken for videos."""

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"))
"""Lower-case suffixes of files that are taken for clips of one frame where data.images is true."""

# Only formats that hold their own pictures: a playlist renamed to .mp4 must not make ffmpeg open other files.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,gif"

_HDR = {16: "PQ", 18: "HLG"}
"""ITU-T H.273 transfer characteristics of high dynamic range."""

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
def faults(doing: str) -> Iterator[None]:
    """Turn what PyAV and the storage raise into FileFault."""
    try:
        yield
    except _ffmpeg_error() as error:
        raise FileFault(f"{doing}: {error.strerror}") from error
    except OSError as error:
        raise FileFault(f"{doing}: {error.strerror or error}", lasting=False) from error


def _ffmpeg_error() -> type[FFmpegError]:
    from av import FFmpegError

    return FFmpegError


@contextmanager
def open_video(stream: BinaryIO, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream that is not a cover picture. Raises FileFault."""
    import av
    from av.stream import Disposition

    with faults("cannot be read as a video"):
        container = av.open(
            stream, "r", options={"format_whitelist": _FORMATS}, metadata_errors="replace", buffer_size=_BUFFER
        )
    with container:
        moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not moving:
            sound = any(s.type == "audio" for s in container.streams)
            raise FileFault("holds no video, only sound" if sound else "holds no video; is it truncated?")
        video = moving[0]
        if video.codec_context is None:
            raise FileFault("its codec is unknown to this build of ffmpeg")
        if video.color_trc in _HDR:
            name = _HDR[video.color_trc]
            raise FileFault(f"is in high dynamic range ({name}); convert it to standard range (BT.709) first")
        video.codec_context.thread_count = threads
        yield container, video


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a stored picture is turned upright: first transposed, then mirrored left-right and upside-down."""

    transpose: bool = False
    mirror: bool = False
    flip: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> Orientation:
        """From the display matrix of the frame, if it has one. Raises FileFault for other than quarter turns.

        The matrix (ISO/IEC 14496-12, 8.2.2) is ((a, b, u), (c, d, v), (x, y, w)): (x', y') = (a x + c y, b x + d y).
        """
        from av.buffer import Buffer

        matrix = frame.side_data.get("DISPLAYMATRIX")
        if not isinstance(matrix, Buffer):
            return cls()
        a, b, _, c, d = struct.unpack("=5i", bytes(memoryview(matrix))[:20])
        if a and d and not b and not c:
            return cls(False, a < 0, d < 0)
        if b and c and not a and not d:
            return cls(True, c < 0, b < 0)
        raise FileFault("is to be shown turned by an angle that is not a quarter turn")

    def upright(self, picture: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """(h, w, 3) as stored -> (h, w, 3) as shown; a view."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.flip else 1, :: -1 if self.mirror else 1]
