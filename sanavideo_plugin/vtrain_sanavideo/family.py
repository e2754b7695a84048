"""The family `sanavideo`: SANA-Video on a checkpoint in diffusers layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    BlockMemory,
    Caption,
    CaptionExtra,
    CheckpointSource,
    ClipShape,
    ConditionSpec,
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
    TextEncoderSpec,
    TextPartSpec,
    TokenCounter,
    TokenGrid,
    digest,
    meaning,
    opened,
    read_json,
    token_digest,
    tokenizer_hashes,
    weight_hashes,
)
from vtrain_sanavideo import check, codec, denoiser, text, tokens
from vtrain_sanavideo.geometry import BUCKETS, AnyCodecConfig, Ltx2CodecConfig, TransformerConfig, vae_title
from vtrain_sanavideo.memory import MEASURED
from vtrain_sanavideo.options import MOTION_SCORE, SanaVideoOptions

if TYPE_CHECKING:
    from torch import Tensor

    from vtrain_sanavideo.denoiser import SanaVideoDenoiser
    from vtrain_sanavideo.text import SanaVideoText


class SanaVideoFamily:
    """A vtrain.contract.Family. Members that read the model folder raise ModelError if it is not sound; `check` lists why."""

    def __init__(self, options: SanaVideoOptions) -> None:
        self._options = options
        self._source = CheckpointSource(options.path, options.revision, check.COMPONENTS)
        other = options.vae_path if options.vae_path not in (None, options.path) else None
        self._vae_source = CheckpointSource(other, None, check.COMPONENTS) if other else None

    @cached_property
    def _transformer(self) -> TransformerConfig:
        return check.read_transformer(self._source.folder / "transformer")

    @cached_property
    def _codec(self) -> AnyCodecConfig:
        return check.read_vae((self._vae_source or self._source).place("vae"))

    @cached_property
    def _geometry(self) -> LatentGeometry:
        return self._codec.geometry(self._transformer.patch_size)

    @cached_property
    def _instruction(self) -> str:
        chosen = self._options.instruction
        return text.default_instruction() if chosen is None else chosen

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
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self._transformer.shapes().values())

    def resolutions(self) -> Mapping[str, tuple[Size, ...]]:
        return dict([BUCKETS[self._transformer.sample_size]])

    def latent_shape(self, clip: ClipShape) -> LatentShape:
        """Raises ValueError for a clip that the codec or the patches would cut, ModelError for one that it cannot decode."""
        shape, vae = self._geometry.latent_shape(clip, "SANA-Video"), self._codec
        if isinstance(vae, Ltx2CodecConfig) and (fault := vae.undecodable(clip.size, tiled=self._options.vae_tiling)):
            raise ModelError(Problem(str(clip), f"the {vae_title(vae)}: {fault}.", "Choose another size."))
        return shape

    def pixel_frames(self, latent_frame: int) -> range:
        return self._geometry.pixel_frames(latent_frame)

    def token_grid(self, latents: LatentShape) -> TokenGrid:
        """Patches of (1, 2, 2) of the 480p model, of (1, 1, 1) of the 720p one."""
        return self._geometry.token_grid(latents)

    @property
    def frame_levels(self) -> bool:
        return True

    def conditions(self) -> tuple[ConditionSpec, ...]:
        """Image-to-video as SanaImageToVideoPipeline has it: the first latent frame stays as it is, at timestep 0."""
        return (ConditionSpec("first_frame", "the first frame", "first_frame", required=False, clean_frames=1),)

    def timestep(self, sigma: Tensor) -> Tensor:
        """int(1000 sigma), as it was trained with; levels of its training grid give their own exactly, though sigma is fp32."""
        # 1000 sigma of a level of that grid is whole, or below a whole number by 1 / 2998 at least; rounding moves it by 9e-5.
        return (1000 * sigma.float() + 2e-4).floor()

    def block_memory(self, *, weights: DType, compute: DType, frame_levels: bool) -> BlockMemory | None:
        config = self._transformer
        key = (config.width, config.mlp_ratio, config.in_channels, config.patch_size)
        return MEASURED.get(key, {}).get((weights, compute, frame_levels))

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
                f"{vae_title(vae)} in {options.vae_precision}, x{vae.space_factor} space, x{vae.time_factor} time, "
                f"{self._geometry.channels} channels{', tiled' if options.vae_tiling else ''}"
                f"{f', from {self._vae_source.describe()}' if self._vae_source else ''}",
            ),
        )

    def scheduler_config(self) -> Mapping[str, object]:
        return read_json(self._source.folder / "scheduler" / "scheduler_config.json")

    @property
    def caption_extras(self) -> tuple[CaptionExtra, ...]:
        """SupportsCaptionExtras."""
        return (replace(MOTION_SCORE, default=str(self._options.motion_score)),)

    def wording(self, caption: Caption, role: Role) -> str:
        """SupportsWording: instruction, motion score and small letters included."""
        return text.wording(caption, role, self._options, self._instruction)

    def token_fingerprint(self, hash_file: HashFile) -> str:
        """SupportsTokenCounts: the tokenizer, and all that is put around a caption."""
        settings = (text.TEXT_TOKENS, self._instruction, self._options.motion_score)
        return token_digest(self._source.part("tokenizer"), hash_file, "sanavideo tokens 1", *settings)

    def open_token_counter(self) -> AbstractContextManager[TokenCounter]:
        return nullcontext(tokens.SanaVideoTokens(self._source.part("tokenizer"), self._options, self._instruction))

    def text_encoders(self) -> Mapping[str, TextEncoderSpec]:
        """Gemma-2, whose tokens the transformer takes with their mask: padding changes nothing."""
        part = TextPartSpec(self._transformer.caption_channels, text.TEXT_TOKENS, dtype=self._options.text_precision)
        return {tokens.ENCODER: TextEncoderSpec({"text": part}, self._text_fingerprint, self._open_text)}

    def _text_fingerprint(self, hash_file: HashFile) -> str:
        encoder, tokenizer = self._source.part("text_encoder"), self._source.part("tokenizer")
        return digest(
            "sanavideo text 1",
            tokenizer_hashes(tokenizer, hash_file),
            meaning(read_json(encoder / "config.json")),
            weight_hashes(encoder, TRANSFORMERS_STEM, hash_file),
            [self._instruction, self._options.motion_score, text.TEXT_TOKENS, self._options.text_precision],
        )

    def video_fingerprint(self, hash_file: HashFile) -> str:
        folder = (self._vae_source or self._source).part("vae")
        return digest(
            "sanavideo video 1",
            check.vae_meaning(folder),
            weight_hashes(folder, DIFFUSERS_STEM, hash_file),
            [self._options.vae_precision, self._options.vae_tiling],
        )

    def _open_text(self, device: str) -> AbstractContextManager[SanaVideoText]:
        encoder, tokenizer = self._source.part("text_encoder"), self._source.part("tokenizer")
        return opened(lambda: text.load(encoder, tokenizer, self._options, self._instruction, device), device)

    def open_video_codec(self, device: str) -> AbstractContextManager[NormalizedCodec]:
        folder = (self._vae_source or self._source).part("vae")
        return opened(lambda: codec.load(folder, self._codec, self._options, device), device)

    def load_denoiser(self, device: str, dtype: DType, weights: Path | None = None) -> SanaVideoDenoiser:
        folder = self._source.part("transformer") if weights is None else weights / "transformer"
        if check.read_transformer(folder) != self._transformer:
            what = f"these weights are not of the model {self._source.name}: their config differs."
            raise ModelError(Problem(str(folder), what, "Name the model that they were trained from."))
        return denoiser.load(folder, self._geometry, device, dtype)
