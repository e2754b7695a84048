"""A window's frames by torchcodec, of the files of which it was measured that it shows what ffmpeg shows.

PyAV opens the file first, within the same bounds, and reads the times of its packets: which frames are taken is decided
as for PyAV. The rest of decoding, from an upright picture in RGB on, is the same too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

import torch
from torch import Tensor

from vtrain.data.decoding.decode import fitted, missing
from vtrain.data.decoding.pixels import Orientation
from vtrain.data.decoding.timing import SLACK, on_screen
from vtrain.data.decoding.video import FileFault, faults, open_video
from vtrain.data.sample import Sample

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from torchcodec.decoders import VideoDecoder

_CONTAINERS = ("mov", "matroska")
_OWN_RANGE = ("yuvj", "rgb", "bgr", "gbr", "0rgb", "0bgr", "argb", "abgr")
"""Pixel formats whose range is their own: torchcodec takes all others for limited."""

_FULL = 2


@dataclass(frozen=True)
class _Times:
    """Of a file's frames in order: seconds since the first, and how long each is shown. begin: of the first in the file.

    damaged: of the first frame whose packet is cut or marked as damaged.
    """

    begin: float
    starts: tuple[float, ...]
    lengths: tuple[float, ...]
    damaged: float | None

    def shown(self, times: list[float]) -> list[int]:
        """The number of the frame on screen at each of `times`; fewer if the file ends before."""
        numbered = zip(self.starts, self.lengths, range(len(self.starts)), strict=True)
        return list(on_screen(numbered, times))


def decode(stream: BinaryIO, sample: Sample, start: float, into: Tensor) -> str:
    """As `decode.decode`. Returns "", or why this file is for PyAV: then nothing was written. Raises FileFault."""
    from torchcodec.decoders import VideoDecoder

    with open_video(stream) as (container, video), faults("cannot be decoded"):
        times = _times(container, video)
        number = video.index
    if isinstance(times, str):
        return times
    shown = times.shown(sample.times(start))
    if times.damaged is not None and any(times.starts[index] >= times.damaged for index in shown):
        raise FileFault("holds a damaged or cut packet")
    stream.seek(0)
    with _torchcodec_faults():
        decoder = VideoDecoder(
            stream, stream_index=number, dimension_order="NHWC", num_ffmpeg_threads=torch.get_num_threads()
        )
    if len(decoder) != len(times.starts):
        return f"torchcodec counts {len(decoder)} frames where there are {len(times.starts)}"
    _write(decoder, times, shown, sample, into)
    return ""


def _write(decoder: VideoDecoder, times: _Times, shown: list[int], sample: Sample, into: Tensor) -> None:
    last, picture = -1, None
    for done, index in enumerate(shown):
        if index != last:
            try:
                last, picture = index, fitted(_frame(decoder, index, times).numpy(), sample)
            except FileFault as fault:
                raise FileFault(f"{fault.reason}, {missing(done, sample)}", lasting=fault.lasting) from fault
        into[:, done] = cast("Tensor", picture)
    if len(shown) < sample.shape.frames:
        raise FileFault(f"{missing(len(shown), sample)}: is it truncated?")


def _frame(decoder: VideoDecoder, index: int, times: _Times) -> Tensor:
    """uint8 (h, w, 3), upright. Raises FileFault, also for a frame of another time than its packet's."""
    with _torchcodec_faults():
        frame = decoder.get_frame_at(index)
    found = frame.pts_seconds - times.begin
    if abs(found - times.starts[index]) > SLACK:
        raise FileFault(f"torchcodec gave the frame of {found:.3f} s for that of {times.starts[index]:.3f} s")
    return cast("Tensor", frame.data)


@contextmanager
def _torchcodec_faults() -> Iterator[None]:
    """Turn what torchcodec raises into FileFault."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileFault(f"cannot be decoded by torchcodec: {first}") from error


def _times(container: InputContainer, video: VideoStream) -> _Times | str:
    """From the packets, all of them read and the first frame decoded; or why the file is for PyAV. Raises FileFault."""
    nominal = 1 / float(video.average_rate) if video.average_rate else 0.0
    first: VideoFrame | None = None
    spans: list[tuple[float, float]] = []
    damaged = None
    for packet in container.demux(video):
        if first is None and (reason := _unfit(container, first := next(iter(packet.decode()), None))):
            return reason
        if not packet.size or packet.is_discard:
            continue
        if packet.pts is None or packet.time_base is None:
            return "its packets have no times of their own"
        time = float(packet.pts * packet.time_base)
        spans.append((time, float((packet.duration or 0) * packet.time_base) or nominal))
        if packet.is_corrupt:
            damaged = time if damaged is None else min(damaged, time)
    if first is None:
        raise FileFault("not one frame can be decoded")
    spans.sort()
    starts = [time for time, _ in spans]
    if len(set(starts)) != len(starts):
        return "it has two frames of one time"
    if first.pts is None or first.time_base is None or float(first.pts * first.time_base) != starts[0]:
        return "its first frames cannot be shown"
    begin = starts[0]
    lengths = tuple(length for _, length in spans)
    return _Times(begin, tuple(time - begin for time in starts), lengths, None if damaged is None else damaged - begin)


def _unfit(container: InputContainer, frame: VideoFrame | None) -> str:
    """Why torchcodec would not show what ffmpeg shows, from the container and the first frame; "" if it would."""
    if not container.format.name.startswith(_CONTAINERS):
        return f"its container ({container.format.name}) is neither MP4, MOV, Matroska nor WebM"
    if frame is None:
        return ""
    turned = Orientation.of(frame)
    if (turned.mirror != turned.flip) != turned.transpose:
        return f"it is {turned}"
    if int(frame.color_range) == _FULL and not frame.format.name.startswith(_OWN_RANGE):
        return f"its range is full ({frame.format.name})"
    return ""
