"""The SANA-Video transformer: diffusers' own class, unmodified."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtrain.contract import (
    Condition,
    Device,
    DiffusersDenoiser,
    DType,
    LatentGeometry,
    LatentShape,
    NoiseLevel,
    load_module,
    timesteps,
)
from vtrain_sanavideo.geometry import SCALE_SHIFT_TABLE

if TYPE_CHECKING:
    from torch import Tensor, nn


LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of self- and cross-attention: all its Linear layers in blocks. The feed-forward is convolutions."""


class SanaVideoDenoiser(DiffusersDenoiser):
    """The denoiser, SupportsLora, SupportsDecayRule and SupportsFeedForward."""

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        """v = e - x0, in the type that the module computes in.

        level.timestep: (B,) in 0..1000, or (B, f), one for each latent frame. Inputs take the weights' type unless autocast
        chooses. Raises ValueError for latents that the patches would not cover: the module would cut them in silence.
        """

        self.check_latents(noisy)
        if condition.extras:
            raise ValueError(f"SANA-Video is conditioned on text alone, not on {', '.join(sorted(condition.extras))}")
        embeds, mask = condition.text.only.masked
        if not Device.of(noisy).autocasting:
            dtype = self._module.patch_embedding.weight.dtype
            noisy, embeds = noisy.to(dtype), embeds.to(dtype)
        timestep = timesteps(level)
        if timestep.ndim == 2:
            grid = self._geometry.token_grid(LatentShape(*noisy.shape[1:]))
            # For each token, in the order of the patches: (B, f) is refused by the module.
            timestep = timestep.repeat_interleave(grid.height * grid.width, dim=1)
        prediction: Tensor = self._module(
            noisy,
            encoder_hidden_states=embeds,
            timestep=timestep,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return prediction

    def decays(self, name: str, shape: tuple[int, ...]) -> bool | None:
        """SupportsDecayRule: shift, scale and gate are vectors, though a table of them has two dimensions."""
        return False if name.endswith(SCALE_SHIFT_TABLE) else None

    @property
    def feed_forwards(self) -> Sequence[nn.Module]:
        """SupportsFeedForward: the convolutions of each block (GLUMBTempConv)."""
        return tuple(block.get_submodule("ff") for block in self.blocks)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return LORA_TARGETS

    def lora_loader(self) -> Any:
        from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin

        return SanaLoraLoaderMixin


def load(folder: Path, geometry: LatentGeometry, device: str, dtype: DType) -> SanaVideoDenoiser:
    """Load the transformer of `folder`. Its rotary tables stay fp32, as from_pretrained leaves them. Raises ModelError."""
    from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel

    module = load_module(SanaVideoTransformer3DModel, folder, dtype, device, unsqueezed=(SCALE_SHIFT_TABLE,))
    return SanaVideoDenoiser(module, geometry)
