"""The families `wan21` and `wan22-ti2v`: Wan on a checkpoint in diffusers layout."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy

from vtrain.contract import (
    Caption,
    ClipShape,
    DType,
    FrameRule,
    HashFile,
    LatentShape,
    ModelError,
    Problem,
    Role,
    Size,
    TokenGrid,
    weight_hashes,
)
from vtrain_wan import check, codec, denoiser, text
from vtrain_wan.config import TI2V, WAN21, CodecConfig, TransformerConfig, identity
from vtrain_wan.options import Wan21Options, WanOptions
from vtrain_wan.source import STEMS, CheckpointSource

if TYPE_CHECKING:
    from vtrain_wan.codec import WanCodec
    from vtrain_wan.denoiser import WanDenoiser
    from vtrain_wan.text import WanText


class WanFamily:
    """A vtrain.contract.Family. Members that read the model folder raise ModelError if it is not sound; `check` lists why."""

    version = WAN21

    def __init__(self, options: WanOptions) -> None:
        self._options = options
        self._source = CheckpointSource(options.path, options.revision)

    @cached_property
    def _transformer(self) -> TransformerConfig:
        return check.read_config(TransformerConfig, self._source.folder / "transformer" / "config.json")

    @cached_property
    def _codec(self) -> CodecConfig:
        return check.read_config(CodecConfig, self._source.folder / "vae" / "config.json")

    @property
    def default_fps(self) -> float:
        return self.version.fps

    @property
    def default_frames(self) -> int:
        return self.version.frames

    @property
    def default_size(self) -> Size:
        return next(iter(self.resolutions().values()))[0]

    @property
    def frame_rule(self) -> FrameRule:
        return self._codec.frame_rule

    @property
    def pixel_stride(self) -> int:
        return self._codec.scale_factor_spatial * math.lcm(*self._transformer.patch_size)

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
        """Raises ValueError for a clip that the codec or the patches would cut."""
        stride, rule, factor = self.pixel_stride, self.frame_rule, self._codec.scale_factor_spatial
        if not rule.accepts(clip.frames) or clip.height % stride or clip.width % stride:
            raise ValueError(f"{clip}: {self.version.title} takes {rule} frames and multiples of {stride} pixels")
        frames = (clip.frames - rule.offset) // rule.stride + 1
        return LatentShape(self._codec.z_dim, frames, clip.height // factor, clip.width // factor)

    def pixel_frames(self, latent_frame: int) -> range:
        last = self.frame_rule.stride * latent_frame
        return range(max(0, last - self.frame_rule.stride + 1), last + 1)

    def token_grid(self, latents: LatentShape) -> TokenGrid:
        """Patches of (1, 2, 2)."""
        time, height, width = self._transformer.patch_size
        return TokenGrid(latents.frames // time, latents.height // height, latents.width // width)

    def check(self) -> Sequence[Problem]:
        size = self._options.size if isinstance(self._options, Wan21Options) else None
        return check.check(self._source, self.version, size)

    def describe(self) -> Sequence[tuple[str, str]]:
        transformer, vae, options = self._transformer, self._codec, self._options
        blocks = f"{transformer.num_layers} blocks x {transformer.width}, {self.parameters:,} parameters"
        return (
            ("model", self._source.describe()),
            ("denoiser", f"{identity(transformer.shapes())}, {blocks}"),
            ("text", f"UMT5 in {options.text_precision}, {text.TEXT_TOKENS} tokens"),
            (
                "video codec",
                f"Wan VAE in {options.vae_precision}, x{vae.scale_factor_spatial} space, x{vae.scale_factor_temporal} time, "
                f"{vae.z_dim} channels{', tiled' if options.vae_tiling else ''}",
            ),
        )

    def scheduler_config(self) -> Mapping[str, object]:
        return check.read_json(self._source.folder / "scheduler" / "scheduler_config.json")

    def wording(self, caption: Caption, role: Role) -> str:
        """SupportsWording: cleaned as the pipeline does."""
        return text.wording(caption, role)

    def text_fingerprint(self, hash_file: HashFile) -> str:
        encoder, tokenizer = self._source.part("text_encoder"), self._source.part("tokenizer")
        names = [path for path in sorted(tokenizer.iterdir()) if path.suffix in (".json", ".model")]
        return _digest(
            "wan text 1",
            {path.name: hash_file(path) for path in names},
            check.meaning(check.read_json(encoder / "config.json")),
            weight_hashes(encoder, STEMS["text_encoder"], hash_file),
            [ftfy.__version__, text.TEXT_TOKENS, self._options.text_precision],
        )

    def video_fingerprint(self, hash_file: HashFile) -> str:
        folder = self._source.part("vae")
        return _digest(
            "wan video 1",
            check.meaning(check.read_json(folder / "config.json")),
            weight_hashes(folder, STEMS["vae"], hash_file),
            [self._options.vae_precision, self._options.vae_tiling],
        )

    def open_text_encoder(self, device: str) -> AbstractContextManager[WanText]:
        encoder, tokenizer = self._source.part("text_encoder"), self._source.part("tokenizer")
        return text.open_text(encoder, tokenizer, self._options.text_precision, device)

    def open_video_codec(self, device: str) -> AbstractContextManager[WanCodec]:
        return codec.open_codec(self._source.part("vae"), self._codec, self._options, device)

    def load_denoiser(self, device: str, dtype: DType, weights: Path | None = None) -> WanDenoiser:
        folder = self._source.part("transformer") if weights is None else weights / "transformer"
        if check.read_config(TransformerConfig, folder / "config.json") != self._transformer:
            what = f"these weights are not of the model {self._source.name}: their config differs."
            raise ModelError(Problem(str(folder), what, "Name the model that they were trained from."))
        return denoiser.load(folder, self._transformer, device, dtype)


_BYTES = {"fp32": 4, "bf16": 2}


class TI2VFamily(WanFamily):
    """Wan 2.2 TI2V: its denoiser takes a level for each latent frame (SupportsFrameLevels)."""

    version = TI2V

    def frame_level_bytes(self, latents: LatentShape, *, weights: DType, compute: DType, checkpointing: bool) -> int:
        """For each token instead of once for the clip: six vectors of the modulation, kept in fp32 by each block."""
        tokens = math.prod(self.token_grid(latents)) - 1
        return tokens * 6 * self._transformer.width * _BYTES["fp32"] * (2 if checkpointing else 1 + self.block_count)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
