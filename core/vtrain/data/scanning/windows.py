"""Which stretches of a clip are used: arithmetic on frame numbers, counted after resampling."""

from __future__ import annotations

from typing import Literal

Window = Literal["start", "center", "all", "random"]


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
    return tuple((2 * number * spare + count - 1) // (2 * (count - 1)) for number in range(count))


def windows(frames: int, length: int, window: Window, count: int, longest: int | None) -> tuple[tuple[int, ...], ...]:
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
