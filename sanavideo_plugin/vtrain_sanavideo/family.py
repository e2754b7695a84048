"""The family `sanavideo`: SANA-Video on a checkpoint in diffusers layout."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

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
from vtrain_sanavideo import check, codec, denoiser, installed, text
from vtrain_sanavideo.geometry import BUCKETS, AnyCodecConfig, TransformerConfig
from vtrain_sanavideo.options import SanaVideoOptions
from vtrain_sanavideo.source import STEMS, CheckpointSource

if TYPE_CHECKING:
    from vtrain_sanavideo.codec import SanaVideoCodec
    from vtrain_sanavideo.denoiser import SanaVideoDenoiser
    from vtrain_sanavideo.text import SanaVideoText

_BYTES = {"fp32": 4, "bf16": 2}
_WAVES = 256
"""Sines and cosines of a timestep, from which its embedding is made."""

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What shapes tokens beside the vocabulary, where it exists."""


class SanaVideoFamily:
    """A vtrain.contract.Family. Members that read the model folder raise ModelError if it is not sound; `check` lists why."""

    def __init__(self, options: SanaVideoOptions) -> None:
        self._options = options
        self._source = CheckpointSource(options.path, options.revision)
        other = options.vae_path if options.vae_path not in (None, options.path) else None
        self._vae_source = CheckpointSource(other) if other else None

    @cached_property
    def _transformer(self) -> TransformerConfig:
        return check.read_transformer(self._source.folder / "transformer")

    @cached_property
    def _codec(self) -> AnyCodecConfig:
        return check.read_codec(check.codec_folder(self._vae_source or self._source))

    @cached_property
    def _instruction(self) -> str:
        chosen = self._options.instruction
        return installed.default_instruction() if chosen is None else chosen

    @property
    def default_fps(self) -> float:
        return 16.0

    @property
    def default_frames(self) -> int:
        return 81

    @property
    def default_size(self) -> Size:
        return BUCKETS[self._transformer.sample_size][1][0]

    @property
    def frame_rule(self) -> FrameRule:
        return self._codec.frame_rule

    @property
    def pixel_stride(self) -> int:
        return self._codec.space_factor * math.lcm(*self._transformer.patch_size)

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
        return self._transformer.caption_channels

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self._transformer.shapes().values())

    def resolutions(self) -> Mapping[str, tuple[Size, ...]]:
        return dict([BUCKETS[self._transformer.sample_size]])

    def latent_shape(self, clip: ClipShape) -> LatentShape:
        """Raises ValueError for a clip that the codec or the patches would cut, ModelError for one that it cannot decode."""
        stride, rule = self.pixel_stride, self.frame_rule
        if not rule.accepts(clip.frames) or clip.height % stride or clip.width % stride:
            raise ValueError(f"{clip}: SANA-Video takes {rule} frames and multiples of {stride} pixels")
        if fault := self._codec.undecodable(clip.size, tiled=self._options.vae_tiling):
            raise ModelError(Problem(str(clip), f"the {self._codec.name}: {fault}.", "Choose another size."))
        factor = self._codec.space_factor
        return LatentShape(
            channels=self._codec.channels,
            frames=(clip.frames - rule.offset) // rule.stride + 1,
            height=clip.height // factor,
            width=clip.width // factor,
        )

    def pixel_frames(self, latent_frame: int) -> range:
        last = self.frame_rule.stride * latent_frame
        return range(max(0, last - self.frame_rule.stride + 1), last + 1)

    def token_grid(self, latents: LatentShape) -> TokenGrid:
        """Patches of (1, 2, 2) of the 480p model, of (1, 1, 1) of the 720p one."""
        time, height, width = self._transformer.patch_size
        return TokenGrid(latents.frames // time, latents.height // height, latents.width // width)

    def frame_level_bytes(self, latents: LatentShape, *, weights: DType, compute: DType, checkpointing: bool) -> int:
        """What is kept for the backward pass of full training; an adapter's keeps a little less.

        For each token instead of once for the clip: in each block shift, scale and gate of two branches and twice
        1 + scale, eight vectors; 1 + scale of the last norm; the waves of the timestep and four vectors of its embedder.
        With checkpointing one block's eight at a time, and once the six that all blocks start from. Gradients are not
        counted: they come while the activations of the blocks go.
        """
        width, kept, made = self._transformer.width, _BYTES[weights], _BYTES[compute]
        block, last = 8 * width * max(kept, made), width * max(kept, made)
        embedder = (_WAVES + 4 * width) * made
        blocks = block + 6 * width * made if checkpointing else self.block_count * block
        # The first token's would be there for the clip as a whole.
        return (math.prod(self.token_grid(latents)) - 1) * (embedder + blocks + last)

    def check(self) -> Sequence[Problem]:
        return check.check(self._source, self._vae_source)

    def describe(self) -> Sequence[tuple[str, str]]:
        transformer, vae, options = self._transformer, self._codec, self._options
        score = "no motion score" if options.motion_score == "none" else f"motion score {options.motion_score}"
        wording = "the pipeline's" if options.instruction is None else "own" if options.instruction else "no"
        return (
            ("model", self._source.describe()),
            ("denoiser", f"{transformer.num_layers} blocks x {transformer.width}, {self.parameters:,} parameters"),
            ("text", f"Gemma-2 in {options.text_precision}, {wording} instruction, {score}, {text.TEXT_TOKENS} tokens"),
            (
                "video codec",
                f"{vae.name} in {options.vae_precision}, x{vae.space_factor} space, x{vae.time_factor} time, "
                f"{vae.channels} channels{', tiled' if options.vae_tiling else ''}"
                f"{f', from {self._vae_source.describe()}' if self._vae_source else ''}",
            ),
        )

    def scheduler_config(self) -> Mapping[str, object]:
        return check.read_json(self._source.folder / "scheduler" / "scheduler_config.json")

    def wording(self, caption: Caption, role: Role) -> str:
        """SupportsWording: instruction, motion score and small letters included."""
        return text.wording(caption, role, self._options, self._instruction)

    def text_fingerprint(self, hash_file: HashFile) -> str:
        encoder, tokenizer = self._source.part("text_encoder"), self._source.part("tokenizer")
        vocabulary = "tokenizer.json" if (tokenizer / "tokenizer.json").is_file() else "tokenizer.model"
        names = [vocabulary, *(name for name in TOKENIZER_FILES if (tokenizer / name).is_file())]
        return _digest(
            "sanavideo text 1",
            {name: hash_file(tokenizer / name) for name in names},
            check.meaning(check.read_json(encoder / "config.json")),
            weight_hashes(encoder, STEMS["text_encoder"], hash_file),
            [self._instruction, self._options.motion_score, text.TEXT_TOKENS, self._options.text_precision],
        )

    def video_fingerprint(self, hash_file: HashFile) -> str:
        folder = self._codec_folder()
        return _digest(
            "sanavideo video 1",
            # With the class's defaults: a config that spells one out is the same model.
            check.codec_meaning(folder),
            weight_hashes(folder, STEMS["vae"], hash_file),
            [self._options.vae_precision, self._options.vae_tiling],
        )

    def open_text_encoder(self, device: str) -> AbstractContextManager[SanaVideoText]:
        encoder, tokenizer = self._source.part("text_encoder"), self._source.part("tokenizer")
        return text.open_text(encoder, tokenizer, self._options, self._instruction, device)

    def open_video_codec(self, device: str) -> AbstractContextManager[SanaVideoCodec]:
        return codec.open_codec(self._codec_folder(), self._codec, self._options, device)

    def load_denoiser(self, device: str, dtype: DType, weights: Path | None = None) -> SanaVideoDenoiser:
        folder = self._source.part("transformer") if weights is None else weights / "transformer"
        if check.read_transformer(folder) != self._transformer:
            what = f"these weights are not of the model {self._source.name}: their config differs."
            raise ModelError(Problem(str(folder), what, "Name the model that they were trained from."))
        return denoiser.load(folder, self._transformer, device, dtype)

    def _codec_folder(self) -> Path:
        """The VAE's folder with its weights."""
        source = self._vae_source or self._source
        folder = check.codec_folder(source)
        return folder if folder == source.folder else source.part(folder.name)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
