"""The transformer's config as a typed record, and the arithmetic on it. No torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from vtrain.contract import PartConfig, Shape, Size

OFFICIAL_480P = (
    Size(832, 480), Size(896, 448), Size(768, 528), Size(720, 560), Size(624, 624), Size(592, 672),
    Size(560, 720), Size(528, 768), Size(496, 816), Size(480, 832), Size(448, 896),
)  # fmt: skip
"""The buckets of the 480p model, the default first (NVlabs/Sana; diffusers has the same as ASPECT_RATIO_480_BIN)."""

SCALE_SHIFT_TABLE = "scale_shift_table"
"""The one weight that some checkpoints store as (1, 2, D) instead of (2, D)."""

Positive = Annotated[int, Field(ge=1)]


class TransformerConfig(PartConfig):
    """transformer/config.json of a SanaVideoTransformer3DModel, over the class's own defaults."""

    in_channels: Positive
    out_channels: Positive | None
    num_attention_heads: Positive
    attention_head_dim: Positive
    num_layers: Positive
    num_cross_attention_heads: Positive
    cross_attention_head_dim: Positive
    cross_attention_dim: Positive
    caption_channels: Positive
    mlp_ratio: float = Field(gt=0)
    attention_bias: bool
    patch_size: tuple[Literal[1], Positive, Positive]
    norm_elementwise_affine: bool
    guidance_embeds: Literal[False]
    qk_norm: Literal["rms_norm_across_heads"] | None

    @property
    def width(self) -> int:
        """D of a block's output."""
        return self.num_attention_heads * self.attention_head_dim

    def shapes(self) -> dict[str, Shape]:
        """Name and shape of every weight."""
        width, out = self.width, self.out_channels or self.in_channels
        shapes: dict[str, Shape] = {
            SCALE_SHIFT_TABLE: (2, width),
            **_layer("patch_embedding", (width, self.in_channels, *self.patch_size)),
            **_layer("time_embed.emb.timestep_embedder.linear_1", (width, 256)),
            **_layer("time_embed.emb.timestep_embedder.linear_2", (width, width)),
            **_layer("time_embed.linear", (6 * width, width)),
            **_layer("caption_projection.linear_1", (width, self.caption_channels)),
            **_layer("caption_projection.linear_2", (width, width)),
            "caption_norm.weight": (width,),
            **_layer("proj_out", (math.prod(self.patch_size) * out, width)),
        }
        block = self._block()
        for number in range(self.num_layers):
            shapes |= {f"transformer_blocks.{number}.{name}": shape for name, shape in block.items()}
        return shapes

    def _block(self) -> dict[str, Shape]:
        width, hidden = self.width, int(self.mlp_ratio * self.width)
        cross = self.num_cross_attention_heads * self.cross_attention_head_dim
        norm2 = _layer("norm2", (width,)) if self.norm_elementwise_affine else {}
        return {
            SCALE_SHIFT_TABLE: (6, width),
            **self._attention("attn1", width, width, self.attention_bias),
            **self._attention("attn2", cross, self.cross_attention_dim, True),
            **norm2,
            **_layer("ff.conv_inverted", (2 * hidden, width, 1, 1)),
            **_layer("ff.conv_depth", (2 * hidden, 1, 3, 3)),
            "ff.conv_point.weight": (width, hidden, 1, 1),
            "ff.conv_temp.weight": (width, width, 3, 1),
        }

    def _attention(self, name: str, inner: int, source: int, bias: bool) -> dict[str, Shape]:
        norms = {f"{name}.norm_{of}.weight": (inner,) for of in "qk"} if self.qk_norm else {}
        return {
            **norms,
            **_layer(f"{name}.to_q", (inner, self.width), bias),
            **_layer(f"{name}.to_k", (inner, source), bias),
            **_layer(f"{name}.to_v", (inner, source), bias),
            **_layer(f"{name}.to_out.0", (self.width, inner)),
        }


def _layer(name: str, weight: Shape, bias: bool = True) -> dict[str, Shape]:
    return {f"{name}.weight": weight, **({f"{name}.bias": weight[:1]} if bias else {})}
