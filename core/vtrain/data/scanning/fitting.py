"""How a clip is fitted to the training: which bucket, which part of the picture, which windows of its frames; or why it is not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vtrain.config.data_tables import DataTable
from vtrain.contract import ClipShape, FrameRule, Size
from vtrain.data.decoding.probe import Probe
from vtrain.data.decoding.video import available_frames
from vtrain.data.sample import Box, Skipped
from vtrain.data.scanning import captions
from vtrain.data.seeds import derive
from vtrain.plan.datasets import measure
from vtrain.plan.records import DatasetPlan


def distance(source: Probe, size: Size) -> float:
    """How far the aspect of the picture as it is shown is from that of a size: the absolute logarithm of their ratio."""
    return abs(math.log(size.aspect * source.height / (source.width * source.pixel_aspect)))


def reduction(source: Probe, table: DataTable) -> float | None:
    """The factor by which downsample_to reduces a picture above max_size; None for others."""
    if table.max_size is None or table.downsample_to is None:
        return None
    own = measure(source.width * source.pixel_aspect, source.height, table.resolution_type)
    return table.downsample_to / own if own > table.max_size else None


def box(source: Probe, size: Size, crop: str, factor: float | None) -> Box:
    """The centred part of the picture with the bucket's aspect, to the nearest stored pixel; crop "none": all of it.

    It is the largest such part; where the picture is reduced by `factor` first and then still larger than the bucket, the
    part that the bucket covers then.
    """
    if crop == "none":
        return Box(0, 0, source.width, source.height)
    shown = source.width * source.pixel_aspect
    scale = max(size.width / shown, size.height / source.height, factor or 0)
    width = min(source.width, max(1, round(size.width / scale / source.pixel_aspect)))
    height = min(source.height, max(1, round(size.height / scale)))
    return Box((source.width - width) // 2, (source.height - height) // 2, width, height)


def place(source: Probe, part: Box, seed: int, ref_id: str, number: int) -> Box:
    """The same part elsewhere in the picture: a pure function of the seed, the clip's id and the sample's number."""
    left = derive(seed, f"crop left {ref_id}", number) % (source.width - part.width + 1)
    top = derive(seed, f"crop top {ref_id}", number) % (source.height - part.height + 1)
    return Box(left, top, part.width, part.height)


def enlarged(part: Box, size: Size) -> bool:
    """Whether a part has fewer stored pixels than its bucket, either way."""
    return part.width < size.width or part.height < size.height


def stretch(source: Probe, part: Box, size: Size) -> float:
    """How much a part becomes wider or higher in its bucket, at least 1; 1.05 is 5%."""
    change = size.aspect * part.height / (part.width * source.pixel_aspect)
    return max(change, 1 / change)


WindowRule = Literal["start", "center", "all", "random"]


def cut(frames: int, length: int) -> tuple[int, ...]:
    """First frames of full stretches of `length` in `frames` (at least `length`): one after the other from the first frame.

    If at least half a stretch is left over, one more ends with the last frame, so no frame is in more than two.
    """
    starts = list(range(0, frames - length + 1, length))
    if 2 * (frames % length) >= length:
        starts.append(frames - length)
    return tuple(starts)


def spread(spare: int, count: int) -> tuple[int, ...]:
    """At most `count` different numbers from 0 to `spare`, both included, at even distances; the middle if it is one."""
    count = min(count, spare + 1)
    if count == 1:
        return (spare // 2,)
    # number * spare / (count - 1), rounded to the nearest in whole numbers.
    return tuple((2 * number * spare + count - 1) // (2 * (count - 1)) for number in range(count))


def windows(
    frames: int, length: int, window: WindowRule, count: int, longest: int | None
) -> tuple[tuple[int, ...], ...]:
    """First frames of the windows of each sample that a clip gives.

    frames: of the clip, at least `length`, which is a window's. count: of windows in a set, for "random". longest: of a
    piece, at least `length`; a longer clip is cut into pieces, and each gives what a clip of its own would.
    """
    span = frames if longest is None else min(frames, longest)
    pieces = cut(frames, span)
    if window == "all":
        return tuple((start,) for start in sorted({piece + start for piece in pieces for start in cut(span, length)}))
    spare = span - length
    chosen = {"start": (0,), "center": (spare // 2,), "random": spread(spare, count)}[window]
    return tuple(tuple(piece + start for start in chosen) for piece in pieces)


FIT_VERSION = 4
"""Raised when the arithmetic here changes, so that file_decisions in the ledger are not mistaken for current ones."""

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

    stretch: how much wider or higher the picture becomes by being squeezed into the bucket, at least 1. cropped: the share of
    its area that is cropped away. aspect: of the picture as it is shown, width by height.
    """

    shape: ClipShape
    fps: float
    cuts: tuple[Cut, ...]
    stretch: float = 1.0
    cropped: float = 0.0
    aspect: float = 1.0


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


def fit(source: Probe, dataset: DatasetPlan, rule: FrameRule, ref_id: str = "") -> Fit | Skipped:
    """The clip's bucket: the size of nearest aspect (log distance), and as many frames as rule and length allow.

    ref_id: from which crop = "random" takes its places.
    """
    video = dataset.table.video
    fps = _rate(source, dataset)
    available = _available(source, dataset, fps)
    frames = _length(available, dataset, rule)
    if frames == 0:
        return too_short(source, dataset, rule, available)
    # By the own rate: a last frame that is shown for long makes no clip slower.
    slow = dataset.fps is not None and source.own_rate < fps * _SAME_RATE
    if frames > 1 and slow and not video.repeat_frames:
        return too_slow(source, dataset, fps)
    if video.window == "all" or dataset.max_frames is not None:
        shortest = frames if video.window == "all" else dataset.max_frames or frames
        if available // shortest > _MOST_CUTS:
            return too_long(available, shortest, _MOST_CUTS)
    small = _too_small(source, dataset)
    if isinstance(small, Skipped):
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
        cropped=1 - part.width * part.height / (source.width * source.height),
        aspect=source.width * source.pixel_aspect / source.height,
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


def _too_small(source: Probe, dataset: DatasetPlan) -> tuple[Size, Box] | Skipped:
    """The bucket's size and the part of the picture for it; or why the picture is too small."""
    table = dataset.table
    own = measure(source.width * source.pixel_aspect, source.height, table.resolution_type)
    if table.min_size is not None and own < table.min_size:
        return below_least(source, dataset, own)
    size, part = _nearest(source, dataset)
    if not table.upscale and enlarged(part, size):
        return too_small(source, part, size)
    return size, part


def _nearest(source: Probe, dataset: DatasetPlan) -> tuple[Size, Box]:
    """Of the sizes whose aspect is nearest: the largest that needs no enlarging, else the smallest.

    A picture above max_size counts as reduced to downsample_to.
    """
    distances = {size: distance(source, size) for size in dataset.sizes}
    least = min(distances.values())
    # Logarithms of equal aspects may differ in their last bits.
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


# -- why a clip is not used ----------------------------------------------------------------------------------------------


def too_short(source: Probe, dataset: DatasetPlan, rule: FrameRule, available: int) -> Skipped:
    """available: frames after resampling and frame_step."""
    remedies = _remedies(source, dataset, rule, available)
    remedy = f": set {' or '.join(remedies)}" if remedies else f" (the frame rule is {rule}): use a longer clip"
    if dataset.fps is None:
        taken = f"{_counted(available)}{_every(dataset)} ({source.frames} in the file)"
    else:
        at_rate = f"at the file's {source.own_rate:.6g}{source.on_average}" if source.duration > 0 else "in the file"
        own = f"{source.frames} {at_rate}"
        taken = f"{_counted(available)}{_every(dataset)} at {dataset.fps:g} fps ({own})"
    return Skipped("dropped", "too short", f"{taken}; needs {dataset.min_frames}{remedy}")


def _remedies(source: Probe, dataset: DatasetPlan, rule: FrameRule, available: int) -> list[str]:
    """Settings of which each alone would do."""
    found, interval = [], dataset.table.video.frame_step
    if least := rule.floor(available):
        found.append(f"data.video.min_frames = {least}")
    if source.frames == 1:
        return found
    fps = dataset.fps or source.own_rate
    smaller = range(interval - 1, 0, -1)
    if enough := next((n for n in smaller if available_frames(source.duration, fps / n) >= dataset.min_frames), 0):
        found.append(f"data.video.frame_step = {enough}")
    own = available_frames(source.duration, source.own_rate / interval)
    if own >= dataset.min_frames and source.own_rate > fps:
        found.append(f"data.video.fps = {source.own_rate:.6g}")
    return found


def too_slow(source: Probe, dataset: DatasetPlan, fps: float) -> Skipped:
    """fps: of a window."""
    interval = dataset.table.video.frame_step
    wanted = f"{fps:g} of data.video.fps" + (f" / frame_step ({dataset.fps:g} / {interval})" if interval > 1 else "")
    return Skipped(
        "dropped",
        "too slow",
        f"{source.own_rate:.6g} frames per second in the file{source.on_average}, fewer than the {wanted}: frames "
        f"would be repeated; set data.video.fps to {math.floor(source.own_rate * interval * 1000) / 1000:g} or less, or "
        "data.video.repeat_frames = true",
    )


def too_long(available: int, length: int, most: int) -> Skipped:
    """length: of a stretch that gives a sample."""
    return Skipped(
        "dropped",
        "too long",
        f"{available} frames after resampling would be {available // length} samples of {length}, more than {most}: "
        'cut the file, or set data.video.window = "start" without data.video.max_frames',
    )


def below_least(source: Probe, dataset: DatasetPlan, own: float) -> Skipped:
    """own: the picture's size in the unit of resolution_type."""
    unit = dataset.table.resolution_type
    words = f"{own:.1f}".removesuffix(".0")
    of = "the edge of a square of its area" if unit == "pixel_area" else "its shorter edge"
    return Skipped(
        "dropped",
        "too small",
        f"{source.width}x{source.height} ({words}, {of}) is below data.min_size = {dataset.table.min_size}: "
        f"set data.min_size to {math.floor(own)} or less",
    )


def too_small(source: Probe, part: Box, size: Size) -> Skipped:
    """part: what of the picture would be used."""
    picture = Size(source.width, source.height)
    used = "" if picture == (part.width, part.height) else f", of which {part.width}x{part.height} would be used,"
    return Skipped(
        "dropped",
        "too small",
        f"{picture}{used} is smaller than its bucket {size}: set data.upscale = true or a smaller data.resolution",
    )


def _counted(frames: int) -> str:
    return f"{frames} frame" if frames == 1 else f"{frames} frames"


def _every(dataset: DatasetPlan) -> str:
    interval = dataset.table.video.frame_step
    return f", every {_ordinal(interval)}" if interval > 1 else ""


def _ordinal(number: int) -> str:
    """2 -> "2nd"."""
    last = 0 if number % 100 in (11, 12, 13) else number % 10
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(last, 'th') }"
