"""Pixels to latents and back through the LTX-2 video VAE of the 720p checkpoint, normalised as SanaVideoPipeline does.

It has the latents' mean and std among its weights. The 480p checkpoint has the Wan VAE, whose config holds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract import DIFFUSERS_STEM, ModelError, NormalizedCodec, Problem, load_autoencoder, stored_numbers
from vtrain_sanavideo.geometry import Ltx2CodecConfig, vae_title
from vtrain_sanavideo.options import SanaVideoOptions

if TYPE_CHECKING:
    from torch import Tensor

LTX2_STATISTICS = ("latents_mean", "latents_std")

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and std, one number for each channel."""


class Ltx2Codec(NormalizedCodec):
    """The LTX-2 video VAE at work."""

    def decode(self, latents: Tensor) -> Tensor:
        """As the Wan VAE's, which ends in [-1, 1] by itself; SanaVideoPipeline cuts this one's pixels when it shows them."""
        return super().decode(latents).clamp(-1, 1)


def load_ltx2(folder: Path, config: Ltx2CodecConfig, options: SanaVideoOptions, device: str) -> Ltx2Codec:
    """The LTX-2 VAE of `folder`, with its statistics. Raises ModelError."""
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video

    # From the file, in full: the module's own are in the storage type of its weights.
    mean, std = ltx2_statistics(folder, config)
    vae = load_autoencoder(AutoencoderKLLTX2Video, folder, options.vae_precision, device, tiling=options.vae_tiling)
    return Ltx2Codec(vae, mean, std, config.geometry(), f"the {vae_title(config)}")


def ltx2_statistics(folder: Path, config: Ltx2CodecConfig) -> Statistics:
    """Mean and std of the latents, from the weights. No torch. Raises ModelError if they are not there, or cannot be."""
    found = stored_numbers(folder, DIFFUSERS_STEM, LTX2_STATISTICS)
    faults = [
        f"{name} has {len(found[name])} numbers, and latent_channels asks for {config.latent_channels}."
        if name in found
        else f"{name} is missing: SanaVideoPipeline normalises latents with it."
        for name in LTX2_STATISTICS
        if len(found.get(name, ())) != config.latent_channels
    ]
    mean, std = (found.get(name, ()) for name in LTX2_STATISTICS)
    if not faults and not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
        faults.append("latents_mean and latents_std must be finite, and latents_std more than 0.")
    if faults:
        raise ModelError(Problem(str(folder), fault, "Take the VAE's own weights.") for fault in faults)
    return mean, std
