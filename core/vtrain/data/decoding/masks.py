"""Masks: an image or a video, white where its clip trains, averaged down to the clip's latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vtrain.data.decoding.decode import SEEK_SECONDS, stamped_from
from vtrain.data.decoding.pixels import Conversion
from vtrain.data.decoding.video import FileFault, faults, on_screen, open_video
from vtrain.data.sample import Sample

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

EMPTY = 4 / 255
"""A mask in which no latent counts for more than this trains nothing: lossy compression makes as much of black."""

_LUMA = np.array([0.2126, 0.7152, 0.0722]) / 255
"""Of ITU-R BT.709, for 8-bit RGB to [0, 1]; a grey is itself."""

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def latent_mask(
    stream: BinaryIO, sample: Sample, start: float, spans: Sequence[range], size: tuple[int, int]
) -> Tensor:
    """fp32 (f, h, w) in [0, 1], 1 where the mask is white: its luma, averaged over the pixels and frames of each latent.

    stream: the mask's file. start: of the window; a video is resampled to the window's own times as the clip is, a file of
    one frame is the same for all. spans: of each latent frame, the frames of the window for which it stands, none empty.
    size: (h, w) of the latents, which cover the sample's box; a mask of another size than the clip is that picture scaled.
    Never inverted. Raises FileFault: the file cannot be read, changes its size, or ends before the window.
    """
    if _is_still(stream):
        total = next(_averages(stream, sample, [0.0], size, seek=False))
        return torch.from_numpy(np.repeat(total[None], len(spans), axis=0)).float()
    times = sample.times(start)
    mask = np.zeros((len(spans), *size))
    latents = [[latent for latent, span in enumerate(spans) if frame in span] for frame in range(len(times))]
    done = 0
    for average in _of_window(stream, sample, times, size):
        for latent in latents[done]:
            mask[latent] += average / len(spans[latent])
        done += 1
    if done < len(times):
        raise FileFault(f"has frames for {done} of the window's {len(times)}: it ends before {times[done]:.3f} s")
    return torch.from_numpy(mask).float()


def trained(mask: Tensor, *, invert: bool) -> Tensor:
    """How much each latent counts, of a mask as `latent_mask` gives it."""
    return 1 - mask if invert else mask


def is_empty(mask: Tensor, *, invert: bool) -> bool:
    """Whether a mask as `latent_mask` gives it trains nothing."""
    return bool(trained(mask, invert=invert).max() <= EMPTY)


def emptiness(name: str, *, invert: bool) -> str:
    """Why a clip with an empty mask is skipped, and what to do. name: of the mask's file in the dataset."""
    colour, switch = ("white", "remove invert") if invert else ("black", "set invert = true")
    return (
        f"its mask {name} is {colour} where the clip is used, so nothing of it would be trained: fix or remove the mask, or "
        f"{switch} in [data.masks] if it is the other way round"
    )


def _is_still(stream: BinaryIO) -> bool:
    """Whether the file has one frame. Raises FileFault. The stream is rewound."""
    with open_video(stream) as (container, video), faults("cannot be decoded"):
        count = sum(1 for _ in islice(stamped_from(container, video, None), 2))
    stream.seek(0)
    if count == 0:
        raise FileFault("not one frame can be decoded")
    return count == 1


def _of_window(stream: BinaryIO, sample: Sample, times: Sequence[float], size: tuple[int, int]) -> Iterator[Numbers]:
    """One average for each of `times`, as many as the file has. Raises FileFault."""
    if times[0] > SEEK_SECONDS:
        found = _averages(stream, sample, times, size, seek=True)
        try:
            first = next(found, None)
        except FileFault:
            first = None
        if first is not None:
            yield first
            yield from found
            return
        stream.seek(0)  # the file cannot be sought that precisely, or at all: take it from its first frame
    yield from _averages(stream, sample, times, size, seek=False)


def _averages(
    stream: BinaryIO, sample: Sample, times: Sequence[float], size: tuple[int, int], *, seek: bool
) -> Iterator[Numbers]:
    """(h, w) of the frame on screen at each of `times`, until the file ends. Raises FileFault."""
    conversion, last, average, cells = Conversion(), None, np.zeros(size), _LatentAreas(sample, size)
    with open_video(stream, torch.get_num_threads()) as (container, video), faults("cannot be decoded"):
        frames = stamped_from(container, video, times[0] if seek else None)
        # A mask may be shorter than its clip by one of its own frames: lengths of files are not exact.
        held = ((time, 2 * duration, frame) for time, duration, frame in frames)
        for frame in on_screen(held, times):
            if frame is not last:
                last, average = frame, cells.of(conversion, frame)
            yield average


class _LatentAreas:
    """The part of a mask's picture that each latent covers, found at the first frame."""

    def __init__(self, sample: Sample, size: tuple[int, int]) -> None:
        self._sample, self._size = sample, size
        self._found: tuple[int, ...] = ()
        self._rows, self._columns = np.empty(0), np.empty(0)

    def of(self, conversion: Conversion, frame: VideoFrame) -> Numbers:
        """(h, w) means in [0, 1]. Raises FileFault."""
        if frame.is_corrupt:
            raise FileFault("holds a damaged frame")
        picture = conversion.upright(frame)
        if not self._found:
            box, clip = self._sample.box, self._sample.picture
            self._found = picture.shape
            self._rows = shares(picture.shape[0], box.top / clip.height, box.height / clip.height, self._size[0])
            self._columns = shares(picture.shape[1], box.left / clip.width, box.width / clip.width, self._size[1])
        elif picture.shape != self._found:
            before, after = (f"{shape[1]}x{shape[0]}" for shape in (self._found, picture.shape))
            raise FileFault(f"its picture size changes from {before} to {after}")
        # The mean over a rectangle is one product over its rows and one over its columns.
        average: Numbers = self._rows @ (picture @ _LUMA) @ self._columns.T
        return average


def shares(pixels: int, start: float, length: float, cells: int) -> Numbers:
    """(cells, pixels): which part of each cell each pixel covers; a row's sum is 1.

    A line of so many pixels from 0 to 1, of which the cells divide [start, start + length] evenly.
    """
    edges = (start + length * np.arange(cells + 1) / cells) * pixels
    left, right = edges[:-1, None], edges[1:, None]
    at = np.arange(pixels)
    covered = np.clip(np.minimum(right, at + 1) - np.maximum(left, at), 0, None)
    found: Numbers = covered / covered.sum(1, keepdims=True)
    return found
