"""The Wan transformer: diffusers' own class, unmodified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtrain.contract import Condition, Device, DiffusersDenoiser, LatentShape, NoiseLevel, timesteps

if TYPE_CHECKING:
    from torch import Tensor

ORIGINAL_NAMES = {
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head",
}  # fmt: skip
"""diffusers' names of modules -> Wan's own, which ComfyUI reads."""


class WanDenoiser(DiffusersDenoiser):
    """The denoiser, SupportsLora and SupportsDecayRule."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    """All Linear layers of a block: what kohya-ss/musubi-tuner and DiffSynth-Studio train by default."""

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        """v = e - x0, in the type that the module computes in.

        level.timestep: (B,) in 0..1000, or (B, f), one for each latent frame (Wan 2.2 TI2V). Inputs take the weights' type
        unless autocast chooses. Raises ValueError for latents that the patches would not cover.
        """
        self.check_latents(noisy)
        text, timestep = condition.text.only.embeds, timesteps(level)
        if not Device.of(noisy).autocasting:
            dtype = self._module.patch_embedding.weight.dtype
            noisy, text = noisy.to(dtype), text.to(dtype)
        if timestep.ndim == 2:  # for each token, in the order of the patches
            grid = self._geometry.token_grid(LatentShape(*noisy.shape[1:]))
            timestep = timestep.repeat_interleave(grid.height * grid.width, dim=1)
        prediction: Tensor = self._module(noisy, timestep, text, return_dict=False)[0]
        return prediction

    def decays(self, name: str, shape: tuple[int, ...]) -> bool | None:
        return False if name.endswith("scale_shift_table") else None

    def lora_loader(self) -> Any:
        from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

        return WanLoraLoaderMixin
