"""Frames to files: H.264 in mp4, and contact sheets as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CRF = "18"
COLUMNS = 6
CELL = 192
LABEL = 16


def to_frames(pixels: Tensor) -> Tensor:
    """pixels (3, F, H, W) in [-1, 1] -> uint8 (F, H, W, 3), rounded as diffusers' VideoProcessor does."""
    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round()
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


def write_mp4(path: Path, frames: Tensor, fps: float) -> None:
    """frames uint8 (F, H, W, 3), H and W even -> H.264, yuv420p, tagged BT.709, limited range. Written aside, then renamed."""
    aside = path.with_name(f".{path.name}.partial")
    _, height, width, _ = frames.shape
    with av.open(str(aside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Without B-frames: x264's choice of them differs from run to run for small pictures (with its assembler code on).
        stream.options = {"crf": CRF, "preset": "medium", "bf": "0"}
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        for picture in frames.numpy():
            rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
            yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
    aside.replace(path)


def read_frames(path: Path, count: int) -> list[np.ndarray]:
    """`count` frames spread over the file, first and last among them, each (H, W, 3) uint8."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    picks = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return [frames[pick] for pick in picks]


def write_sheet(path: Path, videos: Mapping[str, Path]) -> None:
    """A PNG with a row for each video: its nickname, then frames from first to last."""
    rows = {name: read_frames(file, COLUMNS) for name, file in videos.items()}
    first = next(iter(rows.values()))[0]
    height, width = first.shape[0] * CELL // first.shape[1], CELL
    columns = max(len(frames) for frames in rows.values())
    sheet = Image.new("RGB", (columns * width, len(rows) * (height + LABEL)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, (name, frames) in enumerate(rows.items()):
        top = row * (height + LABEL)
        draw.text((2, top + 1), name, fill="black", font=font)
        for column, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame).resize((width, height)), (column * width, top + LABEL))
    sheet.save(path)
