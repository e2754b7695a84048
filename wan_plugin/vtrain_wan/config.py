"""The checkpoint's configs as typed records, the arithmetic on them, and which Wan a checkpoint is. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vtrain.contract import FrameRule, Shape, Size

Positive = Annotated[int, Field(ge=1)]


class TransformerConfig(BaseModel):
    """transformer/config.json of a WanTransformer3DModel, with the class's own defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    patch_size: tuple[Literal[1], Positive, Positive] = (1, 2, 2)
    num_attention_heads: Positive = 40
    attention_head_dim: Positive = 128
    in_channels: Positive = 16
    out_channels: Positive | None = 16
    text_dim: Positive = 4096
    freq_dim: Positive = 256
    ffn_dim: Positive = 13824
    num_layers: Positive = 40
    cross_attn_norm: bool = True

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
        for number in range(self.num_layers):
            shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
        return shapes


def _layer(name: str, *weight: int) -> dict[str, Shape]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


class CodecConfig(BaseModel):
    """vae/config.json of an AutoencoderKLWan. The class's defaults are those of the Wan 2.1 VAE."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    z_dim: Positive = 16
    latents_mean: tuple[float, ...]
    latents_std: tuple[Annotated[float, Field(gt=0)], ...]
    scale_factor_temporal: Positive = 4
    scale_factor_spatial: Positive = 8

    @property
    def frame_rule(self) -> FrameRule:
        """The codec is causal: the first frame stands alone, then scale_factor_temporal frames share a latent frame."""
        return FrameRule(stride=self.scale_factor_temporal, offset=1)


def buckets(official: Size, stride: int) -> tuple[Size, ...]:
    """The official size and its upright one, then other aspects of at most its area.

    Rounded as Wan's image2video.py and diffusers' guide do: round(sqrt(area x aspect)), down to a multiple of the stride.
    """
    sizes = [official, Size(official.height, official.width)]
    for aspect in (1 / 1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 2 / 1, 1 / 2):
        wide, high = (round(math.sqrt(official.area * each)) // stride * stride for each in (aspect, 1 / aspect))
        sizes.append(Size(wide, high))
    return tuple(sizes)


@dataclass(frozen=True)
class Version:
    """What the published models of a version share. expand_timesteps: its denoiser takes a level for each token."""

    title: str
    sizes: Mapping[str, tuple[Size, ...]]
    frames: int
    fps: float
    shift: float
    expand_timesteps: bool = False


WAN21 = Version(
    title="Wan 2.1 text-to-video",
    sizes={"480p": buckets(Size(832, 480), 16), "720p": buckets(Size(1280, 720), 16)},
    frames=81,
    fps=16.0,
    shift=3.0,
)
TI2V = Version(
    title="Wan 2.2 TI2V",
    sizes={"720p": buckets(Size(1280, 704), 32)},
    frames=121,
    fps=24.0,
    shift=5.0,
    expand_timesteps=True,
)

_SIZES = {1536: "1.3B", 5120: "14B", 3072: "5B"}


def identity(shapes: Mapping[str, Shape]) -> str:
    """Which Wan the weights of these names and shapes are: "Wan 2.1 text-to-video 14B". "" if they are of none."""
    width, channels, *_ = shapes.get("patch_embedding.weight", (0, 0))
    parts = {name.split(".")[0] for name in shapes}
    kinds = (
        ("Wan VACE", "vace_blocks" in parts),
        ("Wan Animate", "motion_encoder" in parts),
        ("Wan 2.1 image-to-video", any("image_embedder" in name for name in shapes)),
        ("Wan 2.2 image-to-video", channels == 36),
        (TI2V.title, channels == 48),
        (WAN21.title, channels == 16),
    )
    kind = next((kind for kind, found in kinds if found), "")
    return f"{kind} {_SIZES.get(width, f'of width {width}')}" if kind else ""
