"""Sizes and frame counts: arithmetic that a plan needs before any tensor exists."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


class Size(NamedTuple):
    """A picture's size in pixels. Written WxH in configs, plans and file names; tensors and code are (h, w)."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: object) -> Size:
        """Read "832x480" (width first). Raises ValueError."""
        if isinstance(text, Size):
            return text
        match = re.fullmatch(r"(\d+)\s*[xX]\s*(\d+)", text.strip()) if isinstance(text, str) else None
        if match is None or not int(match[1]) or not int(match[2]):
            raise ValueError('a size is width x height in pixels, such as "832x480"')
        return cls(int(match[1]), int(match[2]))

    @property
    def aspect(self) -> float:
        return self.width / self.height

    @property
    def area(self) -> int:
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.to_string_ser_schema(when_used="always")
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": r"^\d+x\d+$", "examples": ["832x480"]}


class ClipShape(NamedTuple):
    """Frames, height and width of a clip in pixels, in tensor order."""

    frames: int
    height: int
    width: int

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}@{self.frames}"


class LatentShape(NamedTuple):
    """Channels, frames, height and width of one clip's latents (C, f, h, w)."""

    channels: int
    frames: int
    height: int
    width: int


class TokenGrid(NamedTuple):
    """Frames, height and width of one clip in the denoiser's tokens (f, h, w): the grid of folded taps."""

    frames: int
    height: int
    width: int


class FeatureShape(NamedTuple):
    """Frames, height, width and width of vectors of one clip's features (f, h, w, D)."""

    frames: int
    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class FrameRule:
    """Which numbers of frames a video codec takes: stride * k + offset, k >= 0 (4k+1 for the Wan VAE)."""

    stride: int
    offset: int

    def accepts(self, frames: int) -> bool:
        return frames >= self.offset and (frames - self.offset) % self.stride == 0

    def floor(self, frames: int) -> int:
        """The largest accepted count that is <= frames; 0 if there is none."""
        return frames - (frames - self.offset) % self.stride if frames >= self.offset else 0

    def __str__(self) -> str:
        return f"{self.stride}k+{self.offset}"


@dataclass(frozen=True)
class LatentGeometry:
    """How clips become latents and tokens, where the video codec is causal: the frames of `frame_rule.offset` share the first
    latent frame, and each further `frame_rule.stride` of them one more.

    channels: C of latents. space_factor: pixels per latent in height and width. patch: latents per token in time, height and
    width.
    """

    channels: int
    frame_rule: FrameRule
    space_factor: int
    patch: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        """Raises ValueError for a frame rule that leaves the first latent frame without a frame of its own."""
        if self.frame_rule.offset < 1:
            raise ValueError(f"frames by {self.frame_rule}: the first latent frame would stand for none")

    @property
    def pixel_stride(self) -> int:
        """Heights and widths of clips are multiples of this."""
        return self.space_factor * math.lcm(*self.patch[1:])

    def latent_shape(self, clip: ClipShape, title: str) -> LatentShape:
        """Raises ValueError, with `title` in its words, for a clip that the codec or the patches would cut."""
        stride, rule = self.pixel_stride, self.frame_rule
        if not rule.accepts(clip.frames) or clip.height % stride or clip.width % stride:
            raise ValueError(f"{clip}: {title} takes {rule} frames and multiples of {stride} pixels")
        frames = (clip.frames - rule.offset) // rule.stride + 1
        return LatentShape(self.channels, frames, clip.height // self.space_factor, clip.width // self.space_factor)

    def pixel_frames(self, latent_frame: int) -> range:
        """The pixel frames for which a latent frame stands."""
        end = self.frame_rule.offset + latent_frame * self.frame_rule.stride
        return range(end - self.frame_rule.stride if latent_frame else 0, end)

    def token_grid(self, latents: LatentShape) -> TokenGrid:
        """Tokens in time, height and width."""
        time, height, width = self.patch
        return TokenGrid(latents.frames // time, latents.height // height, latents.width // width)
