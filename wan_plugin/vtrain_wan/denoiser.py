"""The Wan transformer: diffusers' own class, unmodified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtrain.contract import Condition, Device, DiffusersDenoiser, LatentShape, NoiseLevel, timesteps
from vtrain_wan.images import EMBEDS, LATENTS

if TYPE_CHECKING:
    from torch import Tensor, nn

ORIGINAL_NAMES = {
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head",
    "add_k_proj": "k_img", "add_v_proj": "v_img",
}  # fmt: skip
"""diffusers' names of modules -> Wan's own, which ComfyUI reads."""


def lora_targets(added_kv_proj_dim: int | None) -> tuple[str, ...]:
    """All Linear layers of a block: what kohya-ss/musubi-tuner trains by default, a picture's keys and values included."""
    of_pictures = ("add_k_proj", "add_v_proj") if added_kv_proj_dim else ()
    return ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", *of_pictures)


class WanDenoiser(DiffusersDenoiser):
    """The denoiser, SupportsLora, SupportsOriginalNames, SupportsDecayRule and SupportsFeedForward."""

    original_names = ORIGINAL_NAMES

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return lora_targets(self._module.config.added_kv_proj_dim)

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        """v = e - x0, in the type that the module computes in.

        level.timestep: (B,) in 0..1000, or (B, f), one for each latent frame (Wan 2.2 TI2V). Inputs take the weights' type
        unless autocast chooses. Wan 2.1 image-to-video is given the picture's latents as more channels, and its embedding as
        more text. Raises ValueError for latents that the patches would not cover, and for another condition than the model's.
        """
        import torch

        self.check_latents(noisy)
        if condition.extras.keys() != (taken := {LATENTS, EMBEDS} if self._module.config.image_dim else set()):
            raise ValueError(f"conditions {sorted(condition.extras)}, and this model takes {sorted(taken)}")
        text, timestep, image = condition.text.only.embeds, timesteps(level), condition.extras.get(EMBEDS)
        if image is not None:
            noisy = torch.cat([noisy, condition.extras[LATENTS].to(noisy)], 1)
        if not Device.of(noisy).autocasting:
            dtype = self._module.patch_embedding.weight.dtype
            noisy, text, image = noisy.to(dtype), text.to(dtype), None if image is None else image.to(dtype)
        if timestep.ndim == 2:  # for each token, in the order of the patches
            grid = self._geometry.token_grid(LatentShape(*noisy.shape[1:]))
            timestep = timestep.repeat_interleave(grid.height * grid.width, dim=1)
        prediction: Tensor = self._module(noisy, timestep, text, image, return_dict=False)[0]
        return prediction

    def decays(self, name: str, shape: tuple[int, ...]) -> bool | None:
        return False if name.endswith("scale_shift_table") else None

    @property
    def feed_forwards(self) -> Sequence[nn.Module]:
        return tuple(block.get_submodule("ffn") for block in self.blocks)

    def lora_loader(self) -> Any:
        from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

        return WanLoraLoaderMixin
