"""Why a clip has no place in its dataset, in words: what it has, what is needed, and which setting would do."""

from __future__ import annotations

import math

from vtrain.contract import FrameRule, Size
from vtrain.data.decoding.probe import Probe
from vtrain.data.decoding.timing import available_frames
from vtrain.data.sample import Box, Left
from vtrain.plan.records import DatasetPlan


def too_short(source: Probe, dataset: DatasetPlan, rule: FrameRule, available: int) -> Left:
    """available: frames after resampling and frame_step."""
    remedies = _remedies(source, dataset, rule, available)
    remedy = f": set {' or '.join(remedies)}" if remedies else f" (the frame rule is {rule}): use a longer clip"
    if dataset.fps is None:
        taken = f"{_counted(available)}{_every(dataset)} ({source.frames} in the file)"
    else:
        own = (
            f"{source.frames} at the file's {source.rate:.6g}"
            if source.duration > 0
            else f"{source.frames} in the file"
        )
        taken = f"{_counted(available)}{_every(dataset)} at {dataset.fps:g} fps ({own})"
    return Left("dropped", "too short", f"{taken}; needs {dataset.min_frames}{remedy}")


def _remedies(source: Probe, dataset: DatasetPlan, rule: FrameRule, available: int) -> list[str]:
    """Settings of which each alone would do."""
    found, interval = [], dataset.table.video.frame_step
    if least := rule.floor(available):
        found.append(f"data.video.min_frames = {least}")
    if source.frames == 1:
        return found
    fps = dataset.fps or source.rate
    smaller = range(interval - 1, 0, -1)
    if enough := next((n for n in smaller if available_frames(source.duration, fps / n) >= dataset.min_frames), 0):
        found.append(f"data.video.frame_step = {enough}")
    own = available_frames(source.duration, source.rate / interval)
    if own >= dataset.min_frames and source.rate > fps:
        found.append(f"data.video.fps = {source.rate:.6g}")
    return found


def too_slow(source: Probe, dataset: DatasetPlan, fps: float) -> Left:
    """fps: of a window."""
    interval = dataset.table.video.frame_step
    wanted = f"{fps:g} of data.video.fps" + (f" / frame_step ({dataset.fps:g} / {interval})" if interval > 1 else "")
    return Left(
        "dropped",
        "too slow",
        f"{source.rate:.6g} frames per second in the file, fewer than the {wanted}: frames "
        f"would be repeated; set data.video.fps to {math.floor(source.rate * interval * 1000) / 1000:g} or less, or "
        "data.video.repeat_frames = true",
    )


def too_long(available: int, length: int, most: int) -> Left:
    """length: of a stretch that gives a sample."""
    return Left(
        "dropped",
        "too long",
        f"{available} frames after resampling would be {available // length} samples of {length}, more than {most}: "
        'cut the file, or set data.video.window = "start" without data.video.max_frames',
    )


def below_least(source: Probe, dataset: DatasetPlan, own: float) -> Left:
    """own: the picture's size in the unit of resolution_type."""
    unit = dataset.table.resolution_type
    words = f"{own:.1f}".removesuffix(".0")
    of = "the edge of a square of its area" if unit == "pixel_area" else "its shorter edge"
    return Left(
        "dropped",
        "too small",
        f"{source.width}x{source.height} ({words}, {of}) is below data.min_size = {dataset.table.min_size}: "
        f"set data.min_size to {math.floor(own)} or less",
    )


def too_small(source: Probe, part: Box, size: Size) -> Left:
    """part: what of the picture would be used."""
    picture = Size(source.width, source.height)
    used = "" if picture == (part.width, part.height) else f", of which {part.width}x{part.height} would be used,"
    return Left(
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
