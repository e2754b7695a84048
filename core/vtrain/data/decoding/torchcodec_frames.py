"""A window's frames by torchcodec, of the files of which it was measured that it shows what ffmpeg shows.

PyAV opens the file first, within the same bounds, and reads the times of its packets: which frames are taken is decided
as for PyAV. The rest of decoding, from an upright picture in RGB on, is the same too. Whether a file is bad is for PyAV to
say: where anything is wrong, or torchcodec cannot, PyAV decodes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from vtrain.data.decoding.decode import fitted
from vtrain.data.decoding.pixels import Orientation
from vtrain.data.decoding.video import SLACK, FileFault, faults, on_screen, open_video
from vtrain.data.sample import Sample

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from torchcodec.decoders import VideoDecoder

_CONTAINERS = ("mov", "matroska")
_OWN_RANGE = ("yuvj", "rgb", "bgr", "gbr", "0rgb", "0bgr", "argb", "abgr")
"""Pixel formats whose range is their own: torchcodec takes all others for limited."""

_FULL = 2  # AVCOL_RANGE_JPEG of ffmpeg


class _Unfit(Exception):
    """Why a file is for PyAV, in words."""


@dataclass(frozen=True)
class _Times:
    """Of a file's frames in order: seconds since the first, and how long each is shown. begin: of the first in the file."""

    begin: float
    starts: tuple[float, ...]
    lengths: tuple[float, ...]

    def shown(self, times: list[float]) -> list[int]:
        """The number of the frame on screen at each of `times`; fewer if the file ends before."""
        numbered = zip(self.starts, self.lengths, range(len(self.starts)), strict=True)
        return list(on_screen(numbered, times))


def decode(stream: BinaryIO, sample: Sample, start: float, into: Tensor) -> str:
    """Write uint8 (3, F, h, w), as `decode.decode` does, and return ""; or return why this file is for PyAV.

    That is also what becomes of a file with any fault: `into` is then to be written again. Raises FileFault for a file that
    cannot be opened.
    """
    try:
        with open_video(stream) as (container, video), faults("cannot be decoded"):
            times, number = _times(container, video), video.index
        shown = times.shown(sample.times(start))
        if len(shown) < sample.shape.frames:
            return "it ends before the window"
        stream.seek(0)
        with _torchcodec_faults():
            _write(_opened(stream, number, len(times.starts)), times, shown, sample, into)
    except _Unfit as unfit:
        return str(unfit)
    return ""


def _opened(stream: BinaryIO, number: int, frames: int) -> VideoDecoder:
    from torchcodec.decoders import VideoDecoder

    threads = torch.get_num_threads()
    decoder = VideoDecoder(stream, stream_index=number, dimension_order="NHWC", num_ffmpeg_threads=threads)
    if len(decoder) != frames:
        raise _Unfit(f"torchcodec counts {len(decoder)} frames where there are {frames}")
    return decoder


def _write(decoder: VideoDecoder, times: _Times, shown: list[int], sample: Sample, into: Tensor) -> None:
    """Raises _Unfit, also where torchcodec gives a frame of another time than its packet's."""
    last, picture = -1, torch.empty(0)
    for done, index in enumerate(shown):
        if index != last:
            frame = decoder.get_frame_at(index)
            found = frame.pts_seconds - times.begin
            if abs(found - times.starts[index]) > SLACK:
                raise _Unfit(f"torchcodec gives the frame of {found:.3f} s for that of {times.starts[index]:.3f} s")
            last, picture = index, fitted(frame.data.numpy(), sample)
        into[:, done] = picture


@contextmanager
def _torchcodec_faults() -> Iterator[None]:
    """Turn what torchcodec raises into _Unfit."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise _Unfit(f"torchcodec cannot decode it: {first}") from error
    except FileFault as fault:
        raise _Unfit(f"it {fault.reason}") from fault


def _times(container: InputContainer, video: VideoStream) -> _Times:
    """From the packets, all of them read and the first frame decoded. Raises _Unfit."""
    nominal = 1 / float(video.average_rate) if video.average_rate else 0.0
    first: VideoFrame | None = None
    spans: list[tuple[float, float]] = []
    if not container.format.name.startswith(_CONTAINERS):
        raise _Unfit(f"its container ({container.format.name}) is neither MP4, MOV, Matroska nor WebM")
    for packet in container.demux(video):
        if first is None and (first := next(iter(packet.decode()), None)) is not None:
            _check(first)
        if packet.is_corrupt:
            raise _Unfit("it holds a damaged or cut packet")
        if packet.is_discard:
            raise _Unfit("its edit list cuts frames off")
        if packet.size:
            spans.append(_span(packet, nominal))
    # Packets come in the order of decoding, which B-frames make another than that of showing.
    spans.sort()
    starts = [time for time, _ in spans]
    if len(set(starts)) != len(starts):
        raise _Unfit("it has two frames of one time")
    if first is None or first.pts is None or first.time_base is None or float(first.pts * first.time_base) != starts[0]:
        raise _Unfit("its first frames cannot be shown")
    return _Times(starts[0], tuple(time - starts[0] for time in starts), tuple(length for _, length in spans))


def _span(packet: Packet[VideoStream], nominal: float) -> tuple[float, float]:
    """Its frame's time, and how long it is shown, in seconds. Raises _Unfit."""
    if packet.pts is None or packet.time_base is None:
        raise _Unfit("its packets have no times of their own")
    return float(packet.pts * packet.time_base), float((packet.duration or 0) * packet.time_base) or nominal


def _check(frame: VideoFrame) -> None:
    """Whether torchcodec shows such a frame as ffmpeg does. Raises _Unfit."""
    turned = Orientation.of(frame)
    # Each of the three is a reflection: an odd number of them mirrors the picture, an even one only turns it.
    if (turned.mirror != turned.flip) != turned.transpose:
        raise _Unfit(f"it is {turned}")
    if int(frame.color_range) == _FULL and not frame.format.name.startswith(_OWN_RANGE):
        raise _Unfit(f"its range is full ({frame.format.name})")
