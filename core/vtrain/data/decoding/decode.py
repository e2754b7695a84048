"""Decoding: a sample's frames, upright, at their times, cropped and brought to the bucket by one antialiased resample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtrain.data.decoding.pixels import Conversion, Picture
from vtrain.data.decoding.video import SLACK, FileFault, faults, on_screen, open_video
from vtrain.data.sample import Sample

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

SEEK_SECONDS = 2.0
"""A window that starts later than this is sought; before, decoding from the first frame costs less."""


def decode(stream: BinaryIO, sample: Sample, start: float, into: Tensor | None = None) -> Tensor:
    """uint8 (3, F, h, w) in the sample's shape, of the window at `start`; written to `into` if that is given.

    One decoded frame is in memory at a time, and those that the codec refers to. Raises FileFault, with both counts if
    frames are missing.
    """
    pixels = torch.empty((3, *sample.shape), dtype=torch.uint8) if into is None else into
    if start > SEEK_SECONDS:
        if _decode(stream, sample, start, pixels, seek=True):
            return pixels
        stream.seek(0)  # the file cannot be sought that precisely: take it from its first frame
    if not _decode(stream, sample, start, pixels, seek=False):
        raise FileFault("its first frame comes after the window's start")
    return pixels


def unit_range(pixels: Tensor) -> Tensor:
    """uint8 -> fp32 in [-1, 1], on the same device."""
    return pixels.float().div_(127.5).sub_(1.0)


def _decode(stream: BinaryIO, sample: Sample, start: float, pixels: Tensor, *, seek: bool) -> bool:
    """False if the first frame that could be had comes too late."""
    times, shape = sample.times(start), sample.shape
    done, last, picture, conversion = 0, None, None, Conversion()
    try:
        with open_video(stream, torch.get_num_threads()) as (container, video), faults("cannot be decoded"):
            for frame in on_screen(stamped_from(container, video, times[0] if seek else None), times):
                if frame is not last:
                    last, picture = frame, _picture(conversion, frame, sample)
                pixels[:, done] = cast("Tensor", picture)
                done += 1
    except FileFault as fault:
        if done:
            raise FileFault(f"{fault.reason}, {missing(done, sample)}", lasting=fault.lasting) from fault
        if not seek:
            raise
    # After a seek nothing could be had, for whatever reason: from the first frame it may.
    if done == 0 and seek:
        return False
    if done < shape.frames:
        raise FileFault(f"{missing(done, sample)}: is it truncated?")
    return True


def missing(done: int, sample: Sample) -> str:
    """Both counts, in words."""
    return f"only {done} of {sample.shape.frames} frames could be decoded"


Stamped = tuple[float, float, "VideoFrame"]
"""(time, duration, frame) in seconds."""


def stamped_from(container: InputContainer, video: VideoStream, seek: float | None) -> Iterator[Stamped]:
    """Frames with times since the first one; from the key frame before `seek` on, if given. Raises FileFault."""
    frames = _stamped(container, video)
    first = next(frames, None)
    if first is None:
        return
    # Decoded also where the window is sought: a file's times need not start at 0.
    origin = first[0]
    if seek is None or video.time_base is None:
        frames = chain([first], frames)
    else:
        container.seek(int((origin + seek - SLACK) / video.time_base), stream=video, backward=True)
        frames = _stamped(container, video)
    for time, duration, frame in frames:
        yield time - origin, duration, frame


def _stamped(container: InputContainer, video: VideoStream) -> Iterator[Stamped]:
    """Frames with the file's own times. Raises FileFault for a frame without a time, or one that goes back."""
    nominal = 1 / float(video.average_rate) if video.average_rate else 0.0
    before = None
    for frame in _whole(container, video):
        stamp = frame.pts if frame.pts is not None else frame.dts
        if stamp is None or frame.time_base is None:
            raise FileFault("its frames have no timestamps")
        time = float(stamp * frame.time_base)
        if before is not None and time < before:
            raise FileFault(f"its timestamps go back, from {before:.3f} s to {time:.3f} s")
        before = time
        yield time, float(frame.duration * frame.time_base) or nominal, frame


def _whole(container: InputContainer, video: VideoStream) -> Iterator[VideoFrame]:
    """All frames. Raises FileFault where the file has a packet that is cut short or marked as damaged."""
    for packet in container.demux(video):
        if packet.is_corrupt:  # ffmpeg only marks it, and decodes what it can
            raise FileFault("holds a damaged or cut packet")
        yield from cast("Iterable[VideoFrame]", packet.decode())


def _picture(conversion: Conversion, frame: VideoFrame, sample: Sample) -> Tensor:
    """One frame -> uint8 (3, h, w) in the bucket. Raises FileFault."""
    if frame.is_corrupt:
        raise FileFault("holds a damaged frame")
    return fitted(conversion.upright(frame), sample)


def fitted(upright: Picture, sample: Sample) -> Tensor:
    """(h, w, 3) as shown -> uint8 (3, h, w): the sample's part of the picture in its bucket. Raises FileFault."""
    if upright.shape[:2] != (sample.picture.height, sample.picture.width):
        found = f"{upright.shape[1]}x{upright.shape[0]}"
        raise FileFault(f"its picture size changes from {sample.picture} to {found}")
    left, top, width, height = sample.box
    # torch takes no negative strides, which the view of a mirrored or turned picture has.
    part = np.ascontiguousarray(upright[top : top + height, left : left + width])
    pixels = torch.from_numpy(part).permute(2, 0, 1)[None]
    size = (sample.shape.height, sample.shape.width)
    if pixels.shape[2:] != size:
        # On bytes: at most 2 of 255 from the exact filter (tests/data/test_decode.py).
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return pixels[0]
