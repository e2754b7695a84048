"""Videos as files, mp4, written and read; and contact sheets: frames of several in one picture. Imports no torch."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

Frames = NDArray[np.uint8]
"""(F, h, w, 3)."""

_CRF = "18"
_LINE = 16
_NARROWEST = 64
"""Pixels that a frame's note needs."""


def write_mp4(path: Path, frames: Tensor, fps: float) -> None:
    """frames uint8 (F, H, W, 3), H and W even -> H.264, yuv420p, tagged BT.709, limited range. Written aside, then renamed."""
    aside = path.with_name(f".{path.name}.partial")
    _, height, width, _ = frames.shape
    with av.open(str(aside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Without B-frames: x264's choice of them differs from run to run for small pictures (with its assembler code on).
        stream.options = {"crf": _CRF, "preset": "medium", "bf": "0"}
        # Tagged: of a file that does not say its matrix, players guess it by the size.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for picture in frames.numpy():
            rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
            yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))  # what the encoder still holds back
    aside.replace(path)


def read_frames(path: Path) -> list[Frames]:
    """All frames of a file, each (h, w, 3)."""
    with av.open(str(path)) as container:
        return [cast("Frames", frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def spread(count: int, most: int) -> tuple[int, ...]:
    """At most `most` of range(count), at even distances, the first and the last among them."""
    return tuple(map(int, np.linspace(0, count - 1, min(count, most)).round()))


@dataclass(frozen=True)
class Strip:
    """Frames under a line of words. notes: what stands below each frame."""

    label: str
    frames: Frames
    notes: Sequence[str]


def write_sheet(path: Path, title: Sequence[str], strips: Sequence[Strip], columns: int) -> None:
    """A PNG, written aside and renamed. title: lines. strips: of one frame size, at least one. Raises OSError."""
    # Of two processes that draw the same sheet each has its own. A name may be as long as the file system allows.
    aside = path.with_name(f".{path.name[:200]}-{secrets.token_hex(4)}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _draw(title, strips, columns).save(aside, format="PNG")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _draw(title: Sequence[str], strips: Sequence[Strip], columns: int) -> Image.Image:
    font = ImageFont.load_default(12)
    height, width = strips[0].frames.shape[1:3]
    cell, tall = max(width, _NARROWEST) + 2, height + _LINE + 2
    lines = [-(-len(strip.frames) // columns) for strip in strips]
    across = max(min(columns, len(strip.frames)) for strip in strips) * cell
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
        for number, (frame, note) in enumerate(zip(strip.frames, strip.notes, strict=True)):
            left, down = number % columns * cell, top + number // columns * tall
            sheet.paste(Image.fromarray(frame), (left, down))
            pen.text((left + 1, down + height), note, fill=(96, 96, 96), font=font)
        top += count * tall
    return sheet


def _drawable(text: str) -> str:
    """The font has no other letters."""
    return text.encode("ascii", errors="backslashreplace").decode()
