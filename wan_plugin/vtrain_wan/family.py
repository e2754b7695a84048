"""The families `wan21` and `wan22-ti2v`: Wan on a checkpoint in diffusers layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import ftfy

from vtrain.contract import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    Caption,
    CausalCodecConfig,
    CheckpointSource,
    ClipShape,
    DType,
    FrameRule,
    HashFile,
    LatentGeometry,
    LatentShape,
    ModelError,
    NormalizedCodec,
    Problem,
    Role,
    Size,
    TokenGrid,
    digest,
    load_autoencoder,
    meaning,
    opened,
    read_json,
    tokenizer_hashes,
    weight_hashes,
)
from vtrain_wan import check, denoiser, text
from vtrain_wan.config import TI2V, WAN21, TransformerConfig, identity
from vtrain_wan.options import Wan21Options, WanOptions


class WanFamily:
    """A vtrain.contract.Family. Members that read the model folder raise ModelError if it is not sound; `check` lists why."""

    version = WAN21

    def __init__(self, options: WanOptions) -> None:
        self._options = options
        self._source = CheckpointSource(options.path, options.revision, check.COMPONENTS)

    @cached_property
    def _transformer(self) -> TransformerConfig:
        return check.read_transformer(self._source.folder / "transformer")

    @cached_property
    def _codec(self) -> CausalCodecConfig:
        return check.read_vae(self._source.folder / "vae")

    @cached_property
    def _geometry(self) -> LatentGeometry:
        return self._codec.geometry(self._transformer.patch_size)

    @property
    def default_fps(self) -> float:
        return self.version.fps

    @property
    def default_frames(self) -> int:
        return self.version.frames

    @property
    def default_size(self) -> Size:
        return next(iter(self.version.sizes.values()))[0]

    @property
    def frame_rule(self) -> FrameRule:
        return self._geometry.frame_rule

    @property
    def pixel_stride(self) -> int:
        return self._geometry.pixel_stride

    @property
    def block_count(self) -> int:
        return self._transformer.num_layers

    @property
    def block_width(self) -> int:
        return self._transformer.width

    @property
    def text_tokens(self) -> int:
        return text.TEXT_TOKENS

    @property
    def text_width(self) -> int:
        return self._transformer.text_dim

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self._transformer.shapes().values())

    def resolutions(self) -> Mapping[str, tuple[Size, ...]]:
        return self.version.sizes

    def latent_shape(self, clip: ClipShape) -> LatentShape:
        return self._geometry.latent_shape(clip, self.version.title)

    def pixel_frames(self, latent_frame: int) -> range:
        return self._geometry.pixel_frames(latent_frame)

    def token_grid(self, latents: LatentShape) -> TokenGrid:
        return self._geometry.token_grid(latents)

    def check(self) -> Sequence[Problem]:
        size = self._options.size if isinstance(self._options, Wan21Options) else None
        return check.check(self._source, self.version, size)

    def describe(self) -> Sequence[tuple[str, str]]:
        transformer, vae, options = self._transformer, self._codec, self._options
        blocks = f"{transformer.num_layers} blocks x {transformer.width}, {self.parameters:,} parameters"
        factors = f"x{vae.space_factor} space, x{vae.time_factor} time, {vae.z_dim} channels"
        return (
            ("model", self._source.describe()),
            ("denoiser", f"{identity(transformer.shapes())}, {blocks}"),
            ("text", f"UMT5 in {options.text_precision}, {text.TEXT_TOKENS} tokens"),
            ("video codec", f"Wan VAE in {options.vae_precision}, {factors}{', tiled' if options.vae_tiling else ''}"),
        )

    def scheduler_config(self) -> Mapping[str, object]:
        return read_json(self._source.folder / "scheduler" / "scheduler_config.json")

    def wording(self, caption: Caption, role: Role) -> str:
        return text.wording(caption, role)

    def text_fingerprint(self, hash_file: HashFile) -> str:
        encoder, tokenizer = self._source.part("text_encoder"), self._source.part("tokenizer")
        return digest(
            "wan text 1",
            tokenizer_hashes(tokenizer, hash_file),
            meaning(read_json(encoder / "config.json")),
            weight_hashes(encoder, TRANSFORMERS_STEM, hash_file),
            # Its version: another one may clean a caption otherwise.
            [ftfy.__version__, text.TEXT_TOKENS, self._options.text_precision],
        )

    def video_fingerprint(self, hash_file: HashFile) -> str:
        folder = self._source.part("vae")
        return digest(
            "wan video 1",
            meaning(read_json(folder / "config.json"), check.vae_defaults()),
            weight_hashes(folder, DIFFUSERS_STEM, hash_file),
            [self._options.vae_precision, self._options.vae_tiling],
        )

    def open_text_encoder(self, device: str) -> AbstractContextManager[text.WanText]:
        encoder, tokenizer = self._source.part("text_encoder"), self._source.part("tokenizer")
        return opened(lambda: text.load(encoder, tokenizer, self._options.text_precision, device), device)

    def open_video_codec(self, device: str) -> AbstractContextManager[NormalizedCodec]:
        return opened(lambda: self._load_codec(device), device)

    def _load_codec(self, device: str) -> NormalizedCodec:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        codec, options, folder = self._codec, self._options, self._source.part("vae")
        vae = load_autoencoder(AutoencoderKLWan, folder, options.vae_precision, device, tiling=options.vae_tiling)
        return NormalizedCodec(vae, codec.latents_mean, codec.latents_std, codec.geometry(), "the Wan VAE")

    def load_denoiser(self, device: str, dtype: DType, weights: Path | None = None) -> denoiser.WanDenoiser:
        folder = self._source.part("transformer") if weights is None else weights / "transformer"
        if check.read_transformer(folder) != self._transformer:
            what = f"these weights are not of the model {self._source.name}: their config differs."
            raise ModelError(Problem(str(folder), what, "Name the model that they were trained from."))
        return denoiser.load(folder, self._geometry, device, dtype)


class TI2VFamily(WanFamily):
    """Wan 2.2 TI2V: its denoiser takes a level for each latent frame (SupportsFrameLevels)."""

    version = TI2V

    def frame_level_bytes(self, latents: LatentShape, *, weights: DType, compute: DType, checkpointing: bool) -> int:
        """For each token instead of once for the clip: six vectors of the modulation, kept in fp32 by each block."""
        tokens = math.prod(self.token_grid(latents)) - 1
        return tokens * 6 * self._transformer.width * 4 * (2 if checkpointing else 1 + self.block_count)
