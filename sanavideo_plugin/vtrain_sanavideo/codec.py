"""Pixels to latents and back through the Wan VAE, normalised as SanaVideoPipeline does."""

from __future__ import annotations

from pathlib import Path

from vtrain.contract import CausalCodecConfig, NormalizedCodec, load_autoencoder
from vtrain_sanavideo.options import SanaVideoOptions


def load(folder: Path, config: CausalCodecConfig, options: SanaVideoOptions, device: str) -> NormalizedCodec:
    """The VAE of `folder`, with the statistics of its config. Raises ModelError."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    vae = load_autoencoder(AutoencoderKLWan, folder, options.vae_precision, device, tiling=options.vae_tiling)
    return NormalizedCodec(vae, config.latents_mean, config.latents_std, config.geometry(), "the Wan VAE")
