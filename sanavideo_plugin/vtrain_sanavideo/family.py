"""The family `sanavideo`: SANA-Video on a checkpoint in diffusers layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract import (
    Caption,
    CaptionExtra,
    CheckpointSource,
    ClipShape,
    ConditionSpec,
    DiffusersFamily,
    DType,
    HashFile,
    LatentShape,
    ModelError,
    NormalizedCodec,
    Problem,
    Role,
    Size,
    TextEncoderSpec,
    TextPartSpec,
    TokenCounter,
    opened,
    token_digest,
)
from vtrain_sanavideo import check, codec, denoiser, text
from vtrain_sanavideo.geometry import BUCKETS, Ltx2CodecConfig, SanaVideoConfig, vae_title
from vtrain_sanavideo.options import MOTION_SCORE, SanaVideoOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vtrain_sanavideo.denoiser import SanaVideoDenoiser
    from vtrain_sanavideo.text import SanaVideoText


class SanaVideoFamily(DiffusersFamily[SanaVideoConfig]):
    """A vtrain.contract.Family. Members that read the model folder raise ModelError if it is not sound; `check` lists why."""

    mark, title = "sanavideo", "SANA-Video"
    default_frames = 81
    default_fps = 16.0
    frame_levels = True
    # The 480p model and the tiny one; a test measures both again.
    measured = json.loads(Path(__file__).with_name("memory.json").read_bytes())
    read_transformer = staticmethod(check.read_transformer)
    read_codec = staticmethod(check.read_vae)
    _options: SanaVideoOptions

    def __init__(self, options: SanaVideoOptions) -> None:
        super().__init__(options, check.COMPONENTS)
        other = options.vae_path if options.vae_path not in (None, options.path) else None
        self._vae_source = CheckpointSource(other, None, check.COMPONENTS) if other else None

    def source_of(self, component: str) -> CheckpointSource:
        return self._vae_source if component == "vae" and self._vae_source else self._source

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return denoiser.LORA_TARGETS

    @property
    def codec_title(self) -> str:
        return vae_title(self._codec)

    def codec_defaults(self) -> Mapping[str, object]:
        return check.vae_defaults(self.source_of("vae").place("vae"))

    @cached_property
    def _instruction(self) -> str:
        chosen = self._options.instruction
        return text.default_instruction() if chosen is None else chosen

    def resolutions(self) -> Mapping[str, tuple[Size, ...]]:
        return dict([BUCKETS[self._transformer.sample_size]])

    def latent_shape(self, clip: ClipShape) -> LatentShape:
        """Raises ValueError for a clip that the codec or the patches would cut, ModelError for one that it cannot decode."""
        shape, vae = super().latent_shape(clip), self._codec
        if isinstance(vae, Ltx2CodecConfig) and (fault := vae.undecodable(clip.size, tiled=self._options.vae_tiling)):
            raise ModelError(Problem(str(clip), f"the {self.codec_title}: {fault}.", "Choose another size."))
        return shape

    def conditions(self) -> tuple[ConditionSpec, ...]:
        """Image-to-video as SanaImageToVideoPipeline has it: the first latent frame stays as it is, at timestep 0."""
        return (ConditionSpec("first_frame", "the first frame", "first_frame", required=False, clean_frames=1),)

    def timestep(self, sigma: Tensor) -> Tensor:
        """int(1000 sigma), as it was trained with; levels of its training grid give their own exactly, though sigma is fp32."""
        # 1000 sigma of a level of that grid is whole, or below a whole number by 1 / 2998 at least; rounding moves it by 9e-5.
        return (1000 * sigma.float() + 2e-4).floor()

    @property
    def memory_key(self) -> str:
        config = self._transformer
        return f"{config.width} {config.mlp_ratio} {config.in_channels} {'x'.join(map(str, config.patch_size))}"

    def check(self) -> Sequence[Problem]:
        return check.check(self._source, self._vae_source)

    def describe(self) -> Sequence[tuple[str, str]]:
        options = self._options
        score = "no motion score" if options.motion_score == "none" else f"motion score {options.motion_score}"
        wording = "the pipeline's" if options.instruction is None else "own" if options.instruction else "no"
        words = f"Gemma-2 in {options.text_precision}, {wording} instruction, {score}, {text.TEXT_TOKENS} tokens"
        return self.rows(words)

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
        return nullcontext(text.SanaVideoTokens(self._source.part("tokenizer"), self._options, self._instruction))

    def text_encoders(self) -> Mapping[str, TextEncoderSpec]:
        """Gemma-2, whose tokens the transformer takes with their mask: padding changes nothing."""
        part = TextPartSpec(self._transformer.caption_channels, text.TEXT_TOKENS, dtype=self._options.text_precision)
        return {text.ENCODER: TextEncoderSpec({"text": part}, self._text_fingerprint, self._open_text)}

    def _text_fingerprint(self, hash_file: HashFile) -> str:
        options = self._options
        settings = (self._instruction, options.motion_score, text.TEXT_TOKENS, options.text_precision)
        return self.component_fingerprint(
            hash_file, "text_encoder", "sanavideo text 1", *settings, tokenizer="tokenizer"
        )

    def _open_text(self, device: str) -> AbstractContextManager[SanaVideoText]:
        encoder, tokenizer = self._source.part("text_encoder"), self._source.part("tokenizer")
        return opened(lambda: text.load(encoder, tokenizer, self._options, self._instruction, device), device)

    def codec_class(self) -> type[nn.Module]:
        """Of the 480p checkpoint."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        kind: type[nn.Module] = AutoencoderKLWan
        return kind

    def load_codec(self, device: str) -> NormalizedCodec:
        if not isinstance(self._codec, Ltx2CodecConfig):
            return super().load_codec(device)
        return codec.load_ltx2(self.source_of("vae").part("vae"), self._codec, self._options, device)

    def denoiser_of(self, folder: Path, device: str, dtype: DType) -> SanaVideoDenoiser:
        return denoiser.load(folder, self._geometry, device, dtype)
