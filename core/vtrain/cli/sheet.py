"""Contact sheets: what training sees of a file, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vtrain.contract import DataError, Problem

MOST_FRAMES = 16
"""Of a window that are shown; of more, so many at even distances, the first and the last among them."""

MOST_WINDOWS = 32
"""That are shown of a file."""

MOST_EDGE = 256
"""Pixels of a frame's longer edge that are shown; a larger one is reduced by a whole number."""

_FULL_COLUMNS = 8
_LINE = 16
_NARROWEST = 64
"""Pixels that a frame's time needs."""

Frames = NDArray[np.uint8]
"""(F, h, w, 3)."""


@dataclass(frozen=True)
class Strip:
    """One window: a line of words, and its frames as they are shown, each with its time in seconds."""

    label: str
    frames: Frames
    times: Sequence[float]


@dataclass(frozen=True)
class Layout:
    """Which frames of windows of one shape are shown, and how much smaller: 1 shows every pixel, 2 a quarter of them."""

    picks: tuple[int, ...]
    reduced: int
    columns: int

    @classmethod
    def of(cls, frames: int, height: int, width: int, *, full: bool) -> Layout:
        """full: every frame, at its own size."""
        if full:
            return cls(tuple(range(frames)), 1, _FULL_COLUMNS)
        picks = np.linspace(0, frames - 1, min(frames, MOST_FRAMES)).round().astype(int)
        return cls(tuple(map(int, picks)), -(-max(height, width) // MOST_EDGE), MOST_FRAMES)

    def strip(self, label: str, frames: Frames, times: Sequence[float]) -> Strip:
        """frames, times: of the whole window."""
        shown = [np.asarray(Image.fromarray(frames[pick]).reduce(self.reduced)) for pick in self.picks]
        return Strip(label, np.stack(shown), [times[pick] for pick in self.picks])

    def words(self, frames: int) -> str:
        """What of the frames is shown."""
        which = "every frame" if len(self.picks) == frames else f"{len(self.picks)} of {frames} frames"
        return f"{which}, {'every pixel' if self.reduced == 1 else f'at 1/{self.reduced} of the size'}"


def write(path: Path, title: Sequence[str], strips: Sequence[Strip], columns: int) -> None:
    """A PNG, written aside and renamed. title: lines. strips: of one size, at least one. Raises DataError."""
    aside = path.with_name(f".{path.name[:200]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _draw(title, strips, columns).save(aside, format="PNG")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        what = f"the contact sheet cannot be written: {error.strerror or error}."
        raise DataError(Problem(str(path), what, "Give another file with --sheet.")) from error


def _draw(title: Sequence[str], strips: Sequence[Strip], columns: int) -> Image.Image:
    font = ImageFont.load_default(12)
    height, width = strips[0].frames.shape[1:3]
    cell, tall = max(width, _NARROWEST) + 2, height + _LINE + 2
    lines = [-(-len(strip.times) // columns) for strip in strips]
    across = max(min(columns, len(strip.times)) for strip in strips) * cell
    words = [*title, *(strip.label for strip in strips)]
    wide = max(across, *(int(font.getlength(_drawable(text))) + 8 for text in words))
    sheet = Image.new("RGB", (wide, (len(title) + len(strips)) * _LINE + 8 + sum(lines) * tall), "white")
    pen = ImageDraw.Draw(sheet)
    top = 2
    for text in title:
        pen.text((2, top), _drawable(text), fill="black", font=font)
        top += _LINE
    for strip, count in zip(strips, lines, strict=True):
        pen.text((2, top), _drawable(strip.label), fill=(0, 0, 160), font=font)
        top += _LINE
        for number, (frame, time) in enumerate(zip(strip.frames, strip.times, strict=True)):
            left, down = number % columns * cell, top + number // columns * tall
            sheet.paste(Image.fromarray(frame), (left, down))
            pen.text((left + 1, down + height), f"{time:.3f} s", fill=(96, 96, 96), font=font)
        top += count * tall
    return sheet


def _drawable(text: str) -> str:
    """The font has no other letters."""
    return text.encode("ascii", errors="backslashreplace").decode()
