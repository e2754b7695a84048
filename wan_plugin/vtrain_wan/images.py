"""A first picture as Wan 2.1 image-to-video is given it, twice: as WanImageToVideoPipeline's prepare_latents and encode_image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtrain.contract import (
    TRANSFORMERS_STEM,
    CheckpointSource,
    ClipShape,
    Component,
    NormalizedCodec,
    PartConfig,
    Problem,
    Shape,
    check_components,
    load_pretrained,
    misfit_problems,
    read_config,
    read_json,
)

if TYPE_CHECKING:
    from torch import Tensor

Unlike = tuple[Path, str, int, int | None]
LATENTS, EMBEDS = "image_latents", "image_embeds"
"""The conditions, and the one tensor of each."""

# diffusers' converter makes one with a projection, which nothing of the pipeline reads; processors are read from their JSON.
_ENCODERS = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
_PROJECTION = (r"^visual_projection\.weight$",)
COMPONENTS: Mapping[str, Component] = {
    "image_encoder": Component(_ENCODERS, TRANSFORMERS_STEM, optional=True),
    "image_processor": Component(config="preprocessor_config.json", optional=True),
}


class ImageEncoderConfig(PartConfig):
    """image_encoder/config.json of a CLIPVisionModel."""

    hidden_size: int = 768
    image_size: int = 224
    patch_size: int = 32

    @property
    def tokens(self) -> int:
        return 1 + (self.image_size // self.patch_size) ** 2

    def shapes(self) -> dict[str, Shape]:
        """Of the weights that bear these numbers."""
        width, patch, place = self.hidden_size, "patch_embedding.weight", "position_embedding.weight"
        return {patch: (width, 3, self.patch_size, self.patch_size), place: (self.tokens, width)}


def read_encoder(folder: Path) -> ImageEncoderConfig:
    return read_config(ImageEncoderConfig, folder / "config.json")


def check(source: CheckpointSource, folder: Path, width: int) -> tuple[list[Problem], tuple[Unlike, ...]]:
    """What is wrong with the parts that only image-to-video has, and what `unlike_parts` is to compare. width: of what is taken."""
    needed = {name: replace(component, optional=False) for name, component in COMPONENTS.items()}
    if problems := check_components(CheckpointSource(source.name, source.revision, needed), "Wan"):
        return problems, ()
    part = folder / "image_encoder"
    found = read_encoder(part)
    problems = misfit_problems(part, TRANSFORMERS_STEM, found.shapes(), some=True)
    return problems, ((part, f"the image encoder's width is {found.hidden_size}", found.hidden_size, width),)


class ImageLatents:
    """A vtrain.contract.ConditionEncoder on the video codec. mask: channels that say which frames are given."""

    def __init__(self, codec: NormalizedCodec, mask: int) -> None:
        self._codec, self._mask = codec, mask

    def encode(self, pixels: Tensor, clip: ClipShape) -> dict[str, Tensor]:
        """(B, mask + C, f, h, w): 1 at the picture's latent frame and 0 after it; the latents of picture and grey frames."""
        import torch

        grey = pixels.new_zeros(*pixels.shape[:2], clip.frames - 1, *pixels.shape[3:])
        latents = self._codec.encode(torch.cat([pixels, grey], 2)).mean
        given = latents.new_zeros(len(latents), self._mask, *latents.shape[2:])
        given[:, :, 0] = 1
        return {LATENTS: torch.cat([given, latents], 1)}

    def close(self) -> None:
        self._codec.close()


class ImageEmbeds:
    """A vtrain.contract.ConditionEncoder: CLIP's last hidden state but one."""

    def __init__(self, processor: Any, model: Any) -> None:
        self._processor, self._model = processor, model

    def encode(self, pixels: Tensor, clip: ClipShape) -> dict[str, Tensor]:
        """(B, tokens, width) fp32."""
        import torch

        # 8 bits, as the pipeline is given a picture: the processor scales and cuts such.
        pictures = ((pixels[:, :, 0] + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        given = self._processor(images=list(pictures), return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            embeds = self._model(**given, output_hidden_states=True).hidden_states[-2]
        # Copied outside inference mode, so that they are tensors like any other.
        return {EMBEDS: embeds.to(pixels.device).clone()}

    def close(self) -> None:
        self._model = None


def load(encoder: Path, processor: Path, device: str) -> ImageEmbeds:
    """Processor and encoder, which diffusers' example loads in fp32. Raises ModelError."""
    # By name the one on Pillow: with torchvision another would be taken, of other last bits.
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    settings = dict(read_json(processor / "preprocessor_config.json"))
    model = load_pretrained(CLIPVisionModel, encoder, "fp32", device, "image encoder", _PROJECTION)
    return ImageEmbeds(CLIPImageProcessorPil.from_dict(settings), model)
