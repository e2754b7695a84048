"""The families `wan21` and `wan22-ti2v`: Wan on a checkpoint in diffusers layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy

from vtrain.contract import (
    CheckpointOptions,
    ClipShape,
    ConditionEncoderSpec,
    ConditionSpec,
    DiffusersFamily,
    DType,
    HashFile,
    Problem,
    Size,
    TextEncoderSpec,
    TextPartSpec,
    TokenCounter,
    TokenizerCounter,
    digest,
    load_module,
    meaning,
    official_sizes,
    opened,
    read_json,
    token_digest,
)
from vtrain_wan import checkpoint, images, text
from vtrain_wan.denoiser import ORIGINAL_NAMES, WanDenoiser, lora_targets

if TYPE_CHECKING:
    from torch import Tensor, nn


class Wan21Family(DiffusersFamily[checkpoint.WanConfig]):
    """A vtrain.contract.Family. Members that read the model folder raise ModelError if it is not sound; `check` lists why."""

    mark, title = "wan", "Wan 2.1"
    kinds: tuple[str, ...] = (checkpoint.TEXT_TO_VIDEO, checkpoint.IMAGE_TO_VIDEO)
    sizes: Mapping[str, tuple[Size, ...]] = {
        "480p": official_sizes(Size(832, 480), 16),
        "720p": official_sizes(Size(1280, 720), 16),
    }
    default_frames = 81
    default_fps = 16.0
    frame_levels = False
    block_list = "blocks"
    # The published models and the tiny ones; tests measure them again.
    measured = json.loads(Path(__file__).with_name("memory.json").read_bytes())
    wording = staticmethod(text.wording)
    codec_title = "Wan VAE"
    original_names = ORIGINAL_NAMES
    read_transformer = staticmethod(checkpoint.read_transformer)
    codec_defaults = staticmethod(checkpoint.vae_defaults)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return lora_targets(self._transformer.added_kv_proj_dim)

    def __init__(self, options: CheckpointOptions, task: str = "", size: str = "") -> None:
        super().__init__(options, checkpoint.COMPONENTS)
        self._wanted = [f"{kind} {size}".rstrip() for kind in self.kinds if kind.endswith(task)]

    def check(self) -> Sequence[Problem]:
        return checkpoint.check(self._source, self._wanted)

    def describe(self) -> Sequence[tuple[str, str]]:
        words = f"UMT5, {text.TOKENS} tokens, in {self._options.text_precision}"
        return self.rows(words, checkpoint.identity(self._transformer.shapes()))

    def resolutions(self) -> Mapping[str, tuple[Size, ...]]:
        """1.3B was published for 480p alone; the others' configs do not say which they are for."""
        return {"480p": self.sizes["480p"]} if self._transformer.width == checkpoint.SMALL else self.sizes

    @property
    def memory_key(self) -> str:
        return f"{self._transformer.width} {self._transformer.ffn_dim} {self._transformer.in_channels}"

    def timestep(self, sigma: Tensor) -> Tensor:
        return 1000 * sigma

    def text_encoders(self) -> Mapping[str, TextEncoderSpec]:
        """UMT5. What stands behind a caption's tokens is zero, and no mask reaches the transformer."""
        part = TextPartSpec(self._transformer.text_dim, text.TOKENS, "full", self._options.text_precision)
        return {"umt5": TextEncoderSpec({"text": part}, self._text_fingerprint, self._open_text)}

    def _text_fingerprint(self, hash_file: HashFile) -> str:
        # With ftfy's version: another one may clean a caption otherwise.
        settings = (ftfy.__version__, text.TOKENS, self._options.text_precision)
        return self.component_fingerprint(hash_file, "text_encoder", "wan text 1", *settings, tokenizer="tokenizer")

    def _open_text(self, device: str) -> AbstractContextManager[text.WanText]:
        encoder, tokenizer = self._source.part("text_encoder"), self._source.part("tokenizer")
        return opened(lambda: text.load(encoder, tokenizer, self._options.text_precision, device), device)

    def token_fingerprint(self, hash_file: HashFile) -> str:
        return token_digest(self._source.part("tokenizer"), hash_file, "wan tokens 1", ftfy.__version__, text.TOKENS)

    def open_token_counter(self) -> AbstractContextManager[TokenCounter]:
        return nullcontext(TokenizerCounter(self._source.part("tokenizer"), "umt5", text.TOKENS, text.wording))

    def conditions(self) -> tuple[ConditionSpec, ...]:
        """Of image-to-video: the first frame's latents with a mask, and its CLIP embedding. Both at every draw."""
        if not self._transformer.image_dim:
            return ()
        latents = ConditionEncoderSpec(
            lambda clip: {images.LATENTS: (self._image_shape(clip), "fp32")},
            lambda hash_file: digest("wan image latents 1", self.video_fingerprint(hash_file)),
            lambda device: opened(
                lambda: images.ImageLatents(self.load_codec(device), self._codec.time_factor), device
            ),
        )
        clip = images.read_encoder(self._source.place("image_encoder"))
        size = (clip.tokens, clip.hidden_size)
        embeds = ConditionEncoderSpec(
            lambda _: {images.EMBEDS: (size, "fp32")}, self._image_fingerprint, self._open_clip
        )
        return (
            ConditionSpec(images.LATENTS, "the first frame", "first_frame", True, 0, latents),
            ConditionSpec(images.EMBEDS, "its CLIP embedding", "first_frame", True, 0, embeds),
        )

    def _image_shape(self, clip: ClipShape) -> tuple[int, ...]:
        channels, *sides = self.latent_shape(clip)
        return (self._codec.time_factor + channels, *sides)

    def _image_fingerprint(self, hash_file: HashFile) -> str:
        processor = meaning(read_json(self._source.place("image_processor") / "preprocessor_config.json"))
        return self.component_fingerprint(hash_file, "image_encoder", "wan image embeds 1", processor)

    def _open_clip(self, device: str) -> AbstractContextManager[images.ImageEmbeds]:
        encoder, processor = self._source.part("image_encoder"), self._source.place("image_processor")
        return opened(lambda: images.load(encoder, processor, device), device)

    def codec_class(self) -> type[nn.Module]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        codec: type[nn.Module] = AutoencoderKLWan
        return codec

    def denoiser_of(self, folder: Path, device: str, dtype: DType) -> WanDenoiser:
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

        module = load_module(WanTransformer3DModel, folder, dtype, device)
        return WanDenoiser(module, self._geometry, blocks="blocks")


class TI2VFamily(Wan21Family):
    """Wan 2.2 TI2V. Its denoiser takes a level for each latent frame."""

    title = checkpoint.TI2V
    kinds = (checkpoint.TI2V,)
    sizes: Mapping[str, tuple[Size, ...]] = {"720p": official_sizes(Size(1280, 704), 32)}
    default_frames = 121
    default_fps = 24.0
    frame_levels = True

    def conditions(self) -> tuple[ConditionSpec, ...]:
        """Image-to-video as WanImageToVideoPipeline has it with expand_timesteps: the first latent frame stays, at timestep 0."""
        return (ConditionSpec("first_frame", "the first frame", "first_frame", required=False, clean_frames=1),)
