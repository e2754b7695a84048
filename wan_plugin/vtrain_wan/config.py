"""What the published models of a version share, the transformer's config, and which Wan a checkpoint is. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from vtrain.contract import PartConfig, Shape, Size

Positive = Annotated[int, Field(ge=1)]


class TransformerConfig(PartConfig):
    """transformer/config.json of a WanTransformer3DModel, over the class's own defaults."""

    patch_size: tuple[Literal[1], Positive, Positive]
    num_attention_heads: Positive
    attention_head_dim: Positive
    in_channels: Positive
    out_channels: Positive | None
    text_dim: Positive
    freq_dim: Positive
    ffn_dim: Positive
    num_layers: Positive
    cross_attn_norm: bool

    @property
    def width(self) -> int:
        """D of a block's output."""
        return self.num_attention_heads * self.attention_head_dim

    def shapes(self) -> dict[str, Shape]:
        """Name and shape of every weight."""
        width, embedder = self.width, "condition_embedder"
        out = math.prod(self.patch_size) * (self.out_channels or self.in_channels)
        shapes: dict[str, Shape] = {
            "scale_shift_table": (1, 2, width),
            **_layer("patch_embedding", width, self.in_channels, *self.patch_size),
            **_layer(f"{embedder}.time_embedder.linear_1", width, self.freq_dim),
            **_layer(f"{embedder}.time_embedder.linear_2", width, width),
            **_layer(f"{embedder}.time_proj", 6 * width, width),
            **_layer(f"{embedder}.text_embedder.linear_1", width, self.text_dim),
            **_layer(f"{embedder}.text_embedder.linear_2", width, width),
            **_layer("proj_out", out, width),
        }
        block: dict[str, Shape] = {
            "scale_shift_table": (1, 6, width),
            **(_layer("norm2", width) if self.cross_attn_norm else {}),
            **_layer("ffn.net.0.proj", self.ffn_dim, width),
            **_layer("ffn.net.2", width, self.ffn_dim),
        }
        for attention in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                block |= _layer(f"{attention}.{name}", width, width)
            block |= {f"{attention}.norm_{of}.weight": (width,) for of in "qk"}
        numbered = {f"blocks.{n}.{name}": shape for n in range(self.num_layers) for name, shape in block.items()}
        return shapes | numbered


def _layer(name: str, *weight: int) -> dict[str, Shape]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def buckets(official: Size, stride: int) -> tuple[Size, ...]:
    """The official size and its upright one, then other aspects of at most its area.

    As Wan's image2video.py and diffusers' guide round: round(sqrt(area x aspect)), down to a multiple of the stride.
    """

    def side(aspect: float) -> int:
        return round(math.sqrt(official.area * aspect)) // stride * stride

    aspects = (1, 4 / 3, 3 / 4, 3 / 2, 2 / 3)
    return (official, Size(official.height, official.width), *(Size(side(each), side(1 / each)) for each in aspects))


@dataclass(frozen=True)
class Version:
    """sizes: bucket sets, the default first. expand_timesteps: the denoiser takes a level for each token."""

    title: str
    sizes: Mapping[str, tuple[Size, ...]]
    frames: int
    fps: float
    expand_timesteps: bool = False


WAN21 = Version(
    "Wan 2.1 text-to-video",
    {"480p": buckets(Size(832, 480), 16), "720p": buckets(Size(1280, 720), 16)},
    frames=81,
    fps=16.0,
)
TI2V = Version("Wan 2.2 TI2V", {"720p": buckets(Size(1280, 704), 32)}, frames=121, fps=24.0, expand_timesteps=True)

_SIZES = {1536: "1.3B", 5120: "14B", 3072: "5B"}
_KINDS = {16: WAN21.title, 36: "Wan 2.2 image-to-video", 48: TI2V.title}
_MARKS = {
    "vace_blocks": "Wan VACE",
    "motion_encoder": "Wan Animate",
    "condition_embedder.image_embedder": "Wan 2.1 image-to-video",
}
"""Weights that only another model has."""


def identity(shapes: Mapping[str, Shape]) -> str:
    """Which Wan weights of these names and shapes are: "Wan 2.1 text-to-video 14B"."""
    width, channels, *_ = shapes.get("patch_embedding.weight", (0, 0))
    marked = [kind for mark, kind in _MARKS.items() if any(name.startswith(mark) for name in shapes)]
    kind = marked[0] if marked else _KINDS.get(channels, f"a Wan of {channels} channels")
    return f"{kind} {_SIZES.get(width, f'of width {width}')}"
