"""A first picture as Wan 2.1 image-to-video is given it, twice: as WanImageToVideoPipeline's prepare_latents and encode_image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtrain.contract import ClipShape, NormalizedCodec, load_pretrained, read_json

if TYPE_CHECKING:
    from torch import Tensor

LATENTS, EMBEDS = "image_latents", "image_embeds"
"""The conditions, and the one tensor of each."""


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
    model = load_pretrained(CLIPVisionModel, encoder, "fp32", device, "image encoder")
    return ImageEmbeds(CLIPImageProcessorPil.from_dict(settings), model)
