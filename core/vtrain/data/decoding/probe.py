"""What a file's header says of its video: codec, size, length. One frame is decoded, to see that it can be."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

from vtrain.data.decoding.cut_off import Walked, check_index, check_walked
from vtrain.data.decoding.video import SLACK, FileFault, faults, open_video, refuse_hdr

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

PROBE_VERSION = 2
"""Raised when the same file would be probed otherwise: a ledger of another version is made again."""

_SQUARE = 0.01
"""Pixel aspects this near to 1 count as 1: encoders write such ratios (512/513) when they round a size."""

_HEAD = 32
"""Bytes that tell what a picture is."""

_TIFF = (b"II*\0", b"MM\0*")
_COMPRESSION = 259
_JPEG = (6, 7)
"""Values of TIFF's tag for compression: as the standard of 1992 has it, and as its later note has it."""

_AGREED = 0.1
"""Length by the header and by the index may differ by this share: the last frame may be shown longer or shorter."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A file's video stream.

    width, height: stored pixels of the upright picture. pixel_aspect: a pixel's width by its height, upright.
    frames: in the file. duration: seconds from the first frame's start to the last one's end; span: to the last one's
    start, 0 if that is not known. turned: how the stored picture was turned to be upright, in words; "": not at all.
    variable: whether its frames come at uneven times, so that its rate is an average.
    """

    codec: str
    width: int
    height: int
    pixel_aspect: float
    frames: int
    duration: float
    span: float = 0.0
    turned: str = ""
    variable: bool = False

    @property
    def rate(self) -> float:
        """Frames per second, on average."""
        return self.frames / self.duration

    @property
    def own_rate(self) -> float:
        """Frames per second from the first to the last, however long that one is shown: the rate that people are told."""
        return (self.frames - 1) / self.span if self.frames > 1 and self.span > 0 else self.rate

    @property
    def on_average(self) -> str:
        """What to say after the rate."""
        return " on average" if self.variable else ""


def probe(stream: BinaryIO) -> Probe:
    """Read the header; where it lacks length or count, or contradicts its own index, walk the packets. Raises FileFault, also
    for a file that ends before its container says.

    MP4 headers sum decoding times: where a variable rate meets B-frames the length can come out a little short.
    """
    from vtrain.data.decoding.pixels import Orientation

    size = _refuse_pictures(stream)
    with open_video(stream) as (container, video):
        check_index(container, video, size)
        length = _still(container) or _header(video)
        frame = _first_frame(container, video)
        turned = Orientation.of(frame)
        aspect = float(video.sample_aspect_ratio or 1) or 1.0
        width, height, codec = frame.width, frame.height, video.codec_context.name
    if length is None:
        stream.seek(0)
        with open_video(stream) as (container, video), faults("its packets cannot be read"):
            length, walked = _walk(container, video)
            check_walked(stream, container, video, walked)
    if turned.transpose:
        width, height, aspect = height, width, 1 / aspect
    square = abs(aspect - 1) <= _SQUARE
    frames, duration, span, variable = length
    return Probe(codec, width, height, 1.0 if square else aspect, frames, duration, span, str(turned), variable)


def _first_frame(container: InputContainer, video: VideoStream) -> VideoFrame:
    """Raises FileFault if there is none, or if it is in high dynamic range."""
    with faults("its first frame cannot be decoded"):
        frame = next(container.decode(video), None)
    if frame is None:
        raise FileFault("not one frame can be decoded")
    refuse_hdr(frame.color_trc)
    return frame


def _refuse_pictures(stream: BinaryIO) -> int:
    """The file's size. Raises FileFault for pictures of which ffmpeg makes something else: of an animated WebP nothing, of an
    animated AVIF one frame, of a TIFF compressed with JPEG a black picture."""
    with faults("cannot be read"):
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        start = stream.read(_HEAD)
        if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X" and start[20:] and start[20] & 2:
            raise FileFault("is an animated WebP, which is not read: save it as MP4 or GIF")
        if start[4:12] == b"ftypavis":
            raise FileFault("is an animated AVIF, which is not read: save it as MP4 or GIF")
        order: Literal["little", "big"] = "little" if start[:2] == b"II" else "big"
        if start[:4] in _TIFF:
            stream.seek(int.from_bytes(start[4:8], order))
            entries = stream.read(2 + 12 * int.from_bytes(stream.read(2), order))
            # A short number stands at the start of its field of four bytes, in either byte order.
            tags = {entries[at : at + 2]: entries[at + 8 : at + 10] for at in range(0, len(entries) - 11, 12)}
            if int.from_bytes(tags.get(_COMPRESSION.to_bytes(2, order), b""), order) in _JPEG:
                raise FileFault("is a TIFF file with JPEG compression; save it with another")
        stream.seek(0)
    return size


class VideoLength(NamedTuple):
    """Of Probe."""

    frames: int
    duration: float
    span: float
    variable: bool = False


_UNEVEN = 0.1
"""A frame that comes this share of the mean time between frames before or after its turn makes the rate variable; by a tick of
the file's clock, or by what Matroska's rounding does, it may be off at any rate."""


def _uneven(stamps: list[int], tick: float) -> bool:
    """stamps: of each frame, in order, in units of `tick` seconds."""
    if len(stamps) < 3 or len({*stamps}) < len(stamps):  # such times are ffmpeg's guesses, in a program stream
        return False
    mean = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    most = max(_UNEVEN * mean, 1, SLACK / tick)
    return any(abs(stamp - stamps[0] - number * mean) > most for number, stamp in enumerate(stamps))


def _still(container: InputContainer) -> VideoLength | None:
    """Of an image file: one frame, shown for 1/25 s, which is ffmpeg's default."""
    return VideoLength(1, 0.04, 0.0) if container.format.name.endswith("_pipe") else None


def _header(video: VideoStream) -> VideoLength | None:
    """If the header has it, and its index does not contradict that.

    An edit list may leave out frames that the header counts, and either may lie.
    """
    if not video.frames or not video.duration or video.duration < 0 or video.time_base is None:
        return None
    stamps = [entry.timestamp for entry in video.index_entries if not entry.is_discard]
    duration = float(video.duration * video.time_base)
    if len(stamps) != video.frames:
        return None
    if len(stamps) < 2:
        return VideoLength(video.frames, duration, 0.0)
    span = float((max(stamps) - min(stamps)) * video.time_base)
    whole = span * len(stamps) / (len(stamps) - 1)
    if abs(duration - whole) > _AGREED * whole:
        return None
    return VideoLength(video.frames, duration, span, _uneven(sorted(stamps), float(video.time_base)))


def _walk(container: InputContainer, video: VideoStream) -> tuple[VideoLength, Walked]:
    """Counted from the packets. Raises FileFault."""
    stamps: list[int] = []
    end, all_end, corrupt = 0, 0.0, [False, False]
    for packet in container.demux():
        stamp = packet.pts if packet.pts is not None else packet.dts
        # PyAV's last packet, which flushes a decoder, has no time.
        if packet.is_discard or stamp is None or packet.time_base is None:
            continue
        after = stamp + (packet.duration or 0)
        all_end = max(all_end, float(after * packet.time_base))
        if packet.stream.index == video.index and packet.size:
            stamps.append(stamp)
            end = after if len(stamps) == 1 else max(end, after)
            # A parser may find one more frame in what came before the cut.
            corrupt = [corrupt[-1], packet.is_corrupt]
    if not stamps or video.time_base is None:
        raise FileFault("its frames have no timestamps")
    count, tick, half = len(stamps), float(video.time_base), any(corrupt)
    stamps.sort()
    first, last = stamps[0], stamps[-1]
    if end <= last and count > 1:  # the last packet has no duration: give it the mean one
        end = last + round((last - first) / (count - 1))
    if end <= first:
        raise FileFault("its length is unknown: one frame without a duration")
    walked = Walked(count, end * tick, max(all_end, end * tick), half)
    return VideoLength(count, (end - first) * tick, (last - first) * tick, _uneven(stamps, tick)), walked
