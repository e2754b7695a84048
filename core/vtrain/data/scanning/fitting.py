"""From a probe to a bucket: which size, which frames, which part of the picture, or why none."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vtrain.contract import ClipShape, FrameRule, Size
from vtrain.data.decoding.probe import Probe
from vtrain.data.decoding.timing import available_frames
from vtrain.data.sample import Box, Left
from vtrain.data.scanning import captions, reasons
from vtrain.data.scanning.boxes import box, distance, enlarged, place, reduction, stretch
from vtrain.data.scanning.windows import windows
from vtrain.plan.records import DatasetPlan
from vtrain.plan.sizes import measure

FIT_VERSION = 3
"""Raised when the arithmetic here changes, so that fates in the ledger are not mistaken for current ones."""

_SAME_RATE = 0.99
"""A source of at least this share of the wanted rate is as fast (29.97 and 30, 23.976 and 24)."""

_MOST_CUTS = 100_000
"""Samples of one clip: days of video, or two frames that are years apart."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One sample of a clip. starts: of its windows, of which a draw uses one, in seconds after the first frame.

    box: the part of the picture that is used.
    """

    starts: tuple[float, ...]
    box: Box


@dataclass(frozen=True, slots=True)
class Fit:
    """A clip's place in its dataset. shape: its bucket. fps: frames a second of a window. cuts: its samples.

    stretch: how much wider or higher the picture becomes by being squeezed into the bucket, at least 1.
    """

    shape: ClipShape
    fps: float
    cuts: tuple[Cut, ...]
    stretch: float = 1.0


def decides(dataset: DatasetPlan, rule: FrameRule) -> list[object]:
    """Everything of a dataset's settings that decides over its files, as JSON knows it."""
    table, video = dataset.table, dataset.table.video
    return [
        FIT_VERSION, dataset.backend.location, dataset.sizes, dataset.frames, dataset.min_frames, dataset.max_frames,
        dataset.fps, str(rule), table.crop, dataset.crop_seed if table.crop == "random" else 0, table.upscale,
        table.resolution_type, table.min_size, table.max_size, table.downsample_to, video.window, video.windows,
        video.frame_step, video.repeat_frames, video.round_to, captions.decides(dataset),
        *([dataset.decoder] if dataset.decoder else []),
    ]  # fmt: skip


def fit(source: Probe, dataset: DatasetPlan, rule: FrameRule, ref_id: str = "") -> Fit | Left:
    """The clip's bucket: the size of nearest aspect (log distance), and as many frames as rule and length allow.

    ref_id: from which crop = "random" takes its places.
    """
    video = dataset.table.video
    fps = _rate(source, dataset)
    available = _available(source, dataset, fps)
    frames = _length(available, dataset, rule)
    if frames == 0:
        return reasons.too_short(source, dataset, rule, available)
    slow = dataset.fps is not None and source.own_rate < fps * _SAME_RATE
    if frames > 1 and slow and not video.repeat_frames:
        return reasons.too_slow(source, dataset, fps)
    if video.window == "all" or dataset.max_frames is not None:
        shortest = frames if video.window == "all" else dataset.max_frames or frames
        if available // shortest > _MOST_CUTS:
            return reasons.too_long(available, shortest, _MOST_CUTS)
    small = _too_small(source, dataset)
    if isinstance(small, Left):
        return small
    size, part = small
    starts = windows(available, frames, video.window, video.windows, dataset.max_frames)
    return Fit(
        shape=ClipShape(frames, size.height, size.width),
        fps=fps,
        cuts=tuple(
            Cut(tuple(k / fps for k in each), _placed(source, part, dataset, ref_id, number))
            for number, each in enumerate(starts, start=1)
        ),
        stretch=stretch(source, part, size) if dataset.table.crop == "none" else 1.0,
    )


def _rate(source: Probe, dataset: DatasetPlan) -> float:
    """Frames a second of a window: data.video.fps or the clip's own, by frame_step."""
    if dataset.fps is not None:
        return dataset.fps / dataset.table.video.frame_step
    return (source.own_rate if source.duration > 0 else 1.0) / dataset.table.video.frame_step


def _available(source: Probe, dataset: DatasetPlan, fps: float) -> int:
    """Frames after resampling. A still picture is one frame, however long it is shown."""
    if dataset.fps is None:
        return math.ceil(source.frames / dataset.table.video.frame_step)
    if source.frames == 1 and not dataset.table.video.repeat_frames:
        return 1
    return available_frames(source.duration, fps)


def _length(available: int, dataset: DatasetPlan, rule: FrameRule) -> int:
    """Frames of a window: at most dataset.frames, round_to's steps above min_frames; 0 if there are too few."""
    if available < dataset.min_frames:
        return 0
    most = min(available, dataset.frames)
    return rule.floor(most - (most - dataset.min_frames) % dataset.table.video.round_to)


def _too_small(source: Probe, dataset: DatasetPlan) -> tuple[Size, Box] | Left:
    """The bucket's size and the part of the picture for it; or why the picture is too small."""
    table = dataset.table
    own = measure(source.width * source.pixel_aspect, source.height, table.resolution_type)
    if table.min_size is not None and own < table.min_size:
        return reasons.below_least(source, dataset, own)
    size, part = _nearest(source, dataset)
    if not table.upscale and enlarged(part, size):
        return reasons.too_small(source, part, size)
    return size, part


def _nearest(source: Probe, dataset: DatasetPlan) -> tuple[Size, Box]:
    """Of the sizes whose aspect is nearest: the largest that needs no enlarging, else the smallest.

    A picture above max_size counts as reduced to downsample_to.
    """
    distances = {size: distance(source, size) for size in dataset.sizes}
    least = min(distances.values())
    near = [size for size in distances if distances[size] <= least + 1e-9]
    if len(near) > 1:
        near.sort(key=lambda size: (size.area, size.width))
    factor = reduction(source, dataset.table)
    boxes = {size: box(source, size, dataset.table.crop, factor) for size in near}
    whole = [size for size in near if not enlarged(boxes[size], size) and _within(source, size, factor)]
    size = whole[-1] if whole else near[0]
    return size, boxes[size]


def _within(source: Probe, size: Size, factor: float | None) -> bool:
    """Whether the reduced picture covers the size."""
    if factor is None:
        return True
    shown = source.width * source.pixel_aspect
    return max(size.width / shown, size.height / source.height) <= factor * (1 + 1e-9)


def _placed(source: Probe, part: Box, dataset: DatasetPlan, ref_id: str, number: int) -> Box:
    if dataset.table.crop != "random":
        return part
    return place(source, part, dataset.crop_seed, ref_id, number)
