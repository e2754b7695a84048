"""The families `wan21` and `wan22-ti2v`: Wan on a checkpoint in diffusers layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy

from vtrain.contract import (
    BlockMemory,
    CheckpointOptions,
    DiffusersFamily,
    DType,
    HashFile,
    Problem,
    Size,
    TextEncoderSpec,
    TextPartSpec,
    TokenBytes,
    load_module,
    official_sizes,
    opened,
)
from vtrain_wan import checkpoint, text
from vtrain_wan.denoiser import WanDenoiser

if TYPE_CHECKING:
    from torch import Tensor, nn


_MEASURED: Mapping[str, Mapping[str, list[int]]] = json.loads(Path(__file__).with_name("memory.json").read_bytes())
"""Of the published models and the tiny ones, as `vtrain.testing.memory.block_memory` measured them; tests measure again."""


class Wan21Family(DiffusersFamily[checkpoint.WanConfig]):
    """A vtrain.contract.Family. Members that read the model folder raise ModelError if it is not sound; `check` lists why."""

    mark, title = "wan", checkpoint.TEXT_TO_VIDEO
    sizes: Mapping[str, tuple[Size, ...]] = {
        "480p": official_sizes(Size(832, 480), 16),
        "720p": official_sizes(Size(1280, 720), 16),
    }
    default_frames = 81
    default_fps = 16.0
    frame_levels = False
    wording = staticmethod(text.wording)
    read_transformer = staticmethod(checkpoint.read_transformer)
    read_codec = staticmethod(checkpoint.read_vae)
    codec_defaults = staticmethod(checkpoint.vae_defaults)

    def __init__(self, options: CheckpointOptions, size: str | None = None) -> None:
        super().__init__(options, checkpoint.COMPONENTS)
        self._wanted = f"{self.title} {size}" if size else self.title

    def check(self) -> Sequence[Problem]:
        return checkpoint.check(self._source, self._wanted)

    def describe(self) -> Sequence[tuple[str, str]]:
        return self.rows(checkpoint.identity(self._transformer.shapes()), f"UMT5, {text.TOKENS} tokens,", "Wan VAE")

    def block_memory(self, *, weights: DType, compute: DType, frame_levels: bool) -> BlockMemory | None:
        model = f"{self._transformer.width} {self._transformer.ffn_dim} {self._transformer.in_channels}"
        found = _MEASURED.get(model, {}).get(f"{weights} {compute} {'frames' if frame_levels else 'clip'}")
        return BlockMemory(TokenBytes(*found[:2]), TokenBytes(*found[2:])) if found else None

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
    sizes: Mapping[str, tuple[Size, ...]] = {"720p": official_sizes(Size(1280, 704), 32)}
    default_frames = 121
    default_fps = 24.0
    frame_levels = True
