"""Resampling in time, by timestamps.

Output frame k shows the source frame that is on screen k / fps seconds after the start of the window: the last one
whose timestamp is not later. Containers round timestamps, Matroska and WebM to a millisecond, so a frame counts as on
screen SLACK seconds before its timestamp; a rule without slack would show 30 frames per second at 15 with judder.
This is ffmpeg's `fps` filter with round=up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

SLACK = 0.00125
"""Seconds: twice Matroska's rounding (of the first frame and of another), and a little."""

FrameT = TypeVar("FrameT")


def available_frames(duration: float, fps: float) -> int:
    """How many output frames start before the source ends, `duration` seconds after its first frame."""
    return max(0, math.ceil((duration - SLACK) * fps))


def on_screen(frames: Iterable[tuple[float, float, FrameT]], times: Sequence[float]) -> Iterator[FrameT]:
    """The frame on screen at each of `times` (ascending).

    frames: (time, duration, frame) in order of time. Yields fewer than len(times) if the source ends before the last,
    and nothing if the first frame comes after times[0].
    """
    done, shown, end = 0, None, -math.inf
    for time, duration, frame in frames:
        if shown is None and time - SLACK > times[0]:
            return
        while shown is not None and done < len(times) and times[done] < time - SLACK:
            yield shown
            done += 1
        if done == len(times):
            return
        shown, end = frame, time + duration
    while shown is not None and done < len(times) and times[done] < end:
        yield shown
        done += 1
