"""The checkpoint's configs as typed records, and the arithmetic on them. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from vtrain.contract import CodecConfig, FrameRule, LatentGeometry, PartConfig, Shape, Size, TransformerConfig, layer

OFFICIAL_480P = (
    Size(832, 480), Size(896, 448), Size(768, 528), Size(720, 560), Size(624, 624), Size(592, 672),
    Size(560, 720), Size(528, 768), Size(496, 816), Size(480, 832), Size(448, 896),
)  # fmt: skip
"""The buckets of the 480p model, the default first (NVlabs/Sana; diffusers has the same as ASPECT_RATIO_480_BIN)."""

OFFICIAL_720P = (
    Size(1280, 704), Size(1344, 672), Size(1152, 800), Size(1088, 832), Size(960, 960), Size(896, 1024),
    Size(832, 1088), Size(800, 1152), Size(736, 1248), Size(704, 1280), Size(672, 1344),
)  # fmt: skip
"""The buckets of the 720p model, the default first (diffusers' ASPECT_RATIO_720_BIN)."""

BUCKETS: Mapping[int, tuple[str, tuple[Size, ...]]] = {30: ("480p", OFFICIAL_480P), 22: ("720p", OFFICIAL_720P)}
"""Name and buckets by the transformer's sample_size, as SanaVideoPipeline chooses them."""

SCALE_SHIFT_TABLE = "scale_shift_table"
"""The one weight that some checkpoints store as (1, 2, D) instead of (2, D)."""

Positive = Annotated[int, Field(ge=1)]


class SanaVideoConfig(TransformerConfig):
    """transformer/config.json of a SanaVideoTransformer3DModel, over the class's own defaults."""

    num_cross_attention_heads: Positive
    cross_attention_head_dim: Positive
    cross_attention_dim: Positive
    caption_channels: Positive
    mlp_ratio: float = Field(gt=0)
    attention_bias: bool
    norm_elementwise_affine: bool
    guidance_embeds: Literal[False]
    qk_norm: Literal["rms_norm_across_heads"] | None
    sample_size: Literal[30, 22]

    def shapes(self) -> dict[str, Shape]:
        width = self.width
        shapes: dict[str, Shape] = {
            SCALE_SHIFT_TABLE: (2, width),
            **layer("patch_embedding", width, self.in_channels, *self.patch_size),
            **layer("time_embed.emb.timestep_embedder.linear_1", width, 256),
            **layer("time_embed.emb.timestep_embedder.linear_2", width, width),
            **layer("time_embed.linear", 6 * width, width),
            **layer("caption_projection.linear_1", width, self.caption_channels),
            **layer("caption_projection.linear_2", width, width),
            "caption_norm.weight": (width,),
            **layer("proj_out", math.prod(self.patch_size) * self.latent_channels, width),
        }
        block = self._block()
        for number in range(self.num_layers):
            shapes |= {f"transformer_blocks.{number}.{name}": shape for name, shape in block.items()}
        return shapes

    def _block(self) -> dict[str, Shape]:
        width, hidden = self.width, int(self.mlp_ratio * self.width)
        cross = self.num_cross_attention_heads * self.cross_attention_head_dim
        norm2 = layer("norm2", width) if self.norm_elementwise_affine else {}
        return {
            SCALE_SHIFT_TABLE: (6, width),
            **self._attention("attn1", width, width, self.attention_bias),
            **self._attention("attn2", cross, self.cross_attention_dim, True),
            **norm2,
            **layer("ff.conv_inverted", 2 * hidden, width, 1, 1),
            **layer("ff.conv_depth", 2 * hidden, 1, 3, 3),
            "ff.conv_point.weight": (width, hidden, 1, 1),
            "ff.conv_temp.weight": (width, width, 3, 1),
        }

    def _attention(self, name: str, inner: int, source: int, bias: bool) -> dict[str, Shape]:
        norms = {f"{name}.norm_{of}.weight": (inner,) for of in "qk"} if self.qk_norm else {}
        return {
            **norms,
            **layer(f"{name}.to_q", inner, self.width, bias=bias),
            **layer(f"{name}.to_k", inner, source, bias=bias),
            **layer(f"{name}.to_v", inner, source, bias=bias),
            **layer(f"{name}.to_out.0", self.width, inner),
        }


Stages = bool | tuple[bool, ...]
"""Whether each stage halves or doubles; one answer is for all of them."""

_TILE, _TILE_STEP = 512, 448
"""Pixels of a tile of the LTX-2 VAE, and from one's start to the next's."""


class Ltx2CodecConfig(PartConfig):
    """vae/config.json of an AutoencoderKLLTX2Video, over the class's own defaults.

    What SanaVideoPipeline does not do is refused: it gives the decoder no noise level, and no scaling factor has an effect.
    """

    in_channels: Literal[3]
    out_channels: Literal[3]
    latent_channels: Positive
    block_out_channels: tuple[Positive, ...] = Field(min_length=1)
    decoder_block_out_channels: tuple[Positive, ...] = Field(min_length=1)
    spatio_temporal_scaling: Stages
    decoder_spatio_temporal_scaling: Stages
    downsample_type: tuple[Literal["conv", "spatial", "temporal", "spatiotemporal"], ...]
    upsample_type: tuple[Literal["spatial", "temporal", "spatiotemporal"], ...]
    decoder_inject_noise: Stages
    timestep_conditioning: Literal[False]
    patch_size: Positive
    patch_size_t: Literal[1]
    scaling_factor: float
    encoder_causal: Literal[True]
    decoder_spatial_padding_mode: str
    spatial_compression_ratio: Positive | None
    temporal_compression_ratio: Positive | None

    @property
    def time_factor(self) -> int:
        """Pixel frames per latent frame, the first apart."""
        return _time(self._down())

    @property
    def space_factor(self) -> int:
        """Pixels per latent in height and width: the pixel patch and what the encoder's stages halve."""
        return self._space(self._down())

    def geometry(self, patch: tuple[int, int, int] = (1, 1, 1)) -> LatentGeometry:
        """The encoder is causal: the first frame stands alone, then time_factor frames share a latent frame.

        patch: the denoiser's, latents per token.
        """
        rule = FrameRule(stride=self.time_factor, offset=1)
        return LatentGeometry(self.latent_channels, rule, self.space_factor, patch)

    def shapes(self) -> dict[str, Shape]:
        """Of the weights that bear the config's numbers, for `misfit_problems(some=True)`."""
        latent, kernel = self.latent_channels, (3, 3, 3)
        return {
            "encoder.conv_in.conv.weight": (latent, self.in_channels * self.patch_size**2, *kernel),
            "encoder.conv_out.conv.weight": (latent + 1, self.block_out_channels[-1], *kernel),
            "decoder.conv_in.conv.weight": (self.decoder_block_out_channels[-1], latent, *kernel),
        }

    def undecodable(self, size: Size, *, tiled: bool) -> str | None:
        """Why latents of that size cannot be decoded, or None: reflected padding takes two latents each way at least."""
        if self.decoder_spatial_padding_mode != "reflect":
            return None
        if min(size) < 2 * self.space_factor:
            return f"{min(size)} pixels are one latent of its decoder, which takes two"
        odd = [edge for edge in size if edge % _TILE_STEP == self.space_factor]
        if tiled and max(size) > _TILE and odd:  # larger in one of the two, it is cut in both
            return f"with vae_tiling the last tile of {odd[0]} pixels is one latent, and its decoder takes two"
        return None

    def faults(self) -> list[str]:
        """What in the config contradicts itself, or SanaVideoPipeline."""
        down, up = self.spatio_temporal_scaling, self.decoder_spatio_temporal_scaling
        stages, decoded = len(self.block_out_channels), len(self.decoder_block_out_channels)
        # The last of these is for the decoder's first stage; its upsample_type are in the decoder's own order.
        drawn = _drawn(self.upsample_type, _each(up, decoded)[::-1])
        ratio, time = ("spatial_compression_ratio", "temporal_compression_ratio")
        pairs = (
            ("downsample_type", len(self.downsample_type), stages, "block_out_channels asks for"),
            ("spatio_temporal_scaling", len(_each(down, stages)), stages, "block_out_channels asks for"),
            ("upsample_type", len(self.upsample_type), decoded, "decoder_block_out_channels asks for"),
            (
                "decoder_spatio_temporal_scaling",
                len(_each(up, decoded)),
                decoded,
                "decoder_block_out_channels asks for",
            ),
            (ratio, self.spatial_compression_ratio, self.space_factor, "the encoder's stages give"),
            (time, self.temporal_compression_ratio, self.time_factor, "the encoder's stages give"),
            (ratio, self.spatial_compression_ratio, self._space(drawn), "the decoder's stages give"),
            (time, self.temporal_compression_ratio, _time(drawn), "the decoder's stages give"),
            ("scaling_factor", self.scaling_factor, 1, "SanaVideoPipeline works with"),
        )
        faults = [f"{name}: {said}, but {why} {is_}." for name, said, is_, why in pairs if said != is_]
        if any(_each(self.decoder_inject_noise, 1)):
            faults.append(
                "decoder_inject_noise: the decoder adds noise, so that latents would not give the same video again."
            )
        return list(dict.fromkeys(faults))

    def _down(self) -> list[str]:
        return _drawn(self.downsample_type, _each(self.spatio_temporal_scaling, len(self.downsample_type)))

    def _space(self, kinds: Sequence[str]) -> int:
        """Pixels per latent: the pixel patch, halved by each stage but those of time alone."""
        return self.patch_size << sum(kind != "temporal" for kind in kinds)


def _time(kinds: Sequence[str]) -> int:
    return 1 << sum(kind != "spatial" for kind in kinds)


def _drawn(kinds: Sequence[str], stages: Sequence[bool]) -> list[str]:
    """Of the stages that halve at all. Other lengths are a fault of the config."""
    return [kind for kind, on in zip(kinds, stages, strict=False) if on]


def _each(stages: Stages, count: int) -> tuple[bool, ...]:
    return (stages,) * count if isinstance(stages, bool) else stages


def vae_title(config: CodecConfig) -> str:
    """What the VAE is called in a plan and in messages."""
    return "LTX-2 VAE" if isinstance(config, Ltx2CodecConfig) else "Wan VAE"
