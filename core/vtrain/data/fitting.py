"""From a probe to a bucket: which size, which frames, which part of the picture, or why none."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vtrain.contract import ClipShape, FrameRule, Size
from vtrain.data.probe import Probe
from vtrain.data.sample import Box, Left
from vtrain.data.timing import available_frames
from vtrain.plan.records import DatasetPlan

FIT_VERSION = 1
"""Raised when the arithmetic here changes, so that fates in the ledger are not mistaken for current ones."""

_SAME_RATE = 0.99
"""A source of at least this share of the wanted rate is as fast (29.97 and 30, 23.976 and 24)."""


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
    table = dataset.table
    return [
        FIT_VERSION, dataset.backend.location, dataset.sizes, dataset.frames, dataset.min_frames, dataset.fps,
        str(rule), table.crop, table.upscale, table.video.window, table.captions, table.missing_caption,
    ]  # fmt: skip


def fit(source: Probe, dataset: DatasetPlan, rule: FrameRule, ref_id: str = "") -> Fit | Left:
    """The clip's bucket: the size of nearest aspect (log distance), and as many frames as rule and length allow."""
    available = available_frames(source.duration, dataset.fps)
    frames = rule.floor(min(available, dataset.frames))
    if available < dataset.min_frames or frames == 0:
        return _too_short(source, dataset, rule, available)
    if frames > 1 and source.rate < dataset.fps * _SAME_RATE and not dataset.table.video.repeat_frames:
        return _too_slow(source, dataset)
    size, box = _nearest(source, dataset)
    if not dataset.table.upscale and _enlarged(box, size):
        return _too_small(source, box, size)
    spare = available - frames if dataset.table.video.window == "center" else 0
    cuts = (Cut(((spare // 2) / dataset.fps,), box),)
    return Fit(ClipShape(frames, size.height, size.width), dataset.fps, cuts)


def _nearest(source: Probe, dataset: DatasetPlan) -> tuple[Size, Box]:
    """Of the sizes whose aspect is nearest: the largest that needs no enlarging, else the smallest."""
    aspect = source.width * source.pixel_aspect / source.height
    distance = {size: abs(math.log(size.aspect / aspect)) for size in dataset.sizes}
    least = min(distance.values())
    near = [size for size in distance if distance[size] <= least + 1e-9]
    if len(near) > 1:
        near.sort(key=lambda size: (size.area, size.width))
    boxes = {size: _box(source, size, dataset.table.crop) for size in near}
    whole = [size for size in near if not _enlarged(boxes[size], size)]
    size = whole[-1] if whole else near[0]
    return size, boxes[size]


def _box(source: Probe, size: Size, crop: str) -> Box:
    """The largest centred part of the picture with the bucket's aspect, to the nearest stored pixel; or all of it."""
    if crop == "none":
        return Box(0, 0, source.width, source.height)
    shown = source.width * source.pixel_aspect
    scale = max(size.width / shown, size.height / source.height)
    width = min(source.width, max(1, round(size.width / scale / source.pixel_aspect)))
    height = min(source.height, max(1, round(size.height / scale)))
    return Box((source.width - width) // 2, (source.height - height) // 2, width, height)


def _enlarged(box: Box, size: Size) -> bool:
    return box.width < size.width or box.height < size.height


def _too_short(source: Probe, dataset: DatasetPlan, rule: FrameRule, available: int) -> Left:
    remedies = []
    if least := rule.floor(available):
        remedies.append(f"data.video.min_frames = {least}")
    own = available_frames(source.duration, source.rate)
    if own >= dataset.min_frames and source.rate > dataset.fps:
        remedies.append(f"data.video.fps = {source.rate:.6g}")
    remedy = f": set {' or '.join(remedies)}" if remedies else f" (the frame rule is {rule}): use a longer clip"
    return Left(
        "dropped",
        "too short",
        f"{_counted(available)} at {dataset.fps:g} fps ({source.frames} at the file's {source.rate:.6g}); "
        f"needs {max(dataset.min_frames, rule.offset)}{remedy}",
    )


def _too_slow(source: Probe, dataset: DatasetPlan) -> Left:
    return Left(
        "dropped",
        "too slow",
        f"{source.rate:.6g} frames per second in the file, fewer than the {dataset.fps:g} of data.video.fps: frames "
        f"would be repeated; set data.video.fps to {math.floor(source.rate * 1000) / 1000:g} or less, or "
        "data.video.repeat_frames = true",
    )


def _too_small(source: Probe, box: Box, size: Size) -> Left:
    picture = Size(source.width, source.height)
    used = "" if picture == (box.width, box.height) else f", of which {box.width}x{box.height} would be used,"
    return Left(
        "dropped",
        "too small",
        f"{picture}{used} is smaller than its bucket {size}: set data.upscale = true or a smaller data.resolution",
    )


def _counted(frames: int) -> str:
    return f"{frames} frame" if frames == 1 else f"{frames} frames"
