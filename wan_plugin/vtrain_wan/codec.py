"""Pixels to latents and back through the Wan VAE, normalised as WanPipeline does."""

# mypy: allow-untyped-calls
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract import Device, Latents, fill_module
from vtrain_wan.config import CodecConfig
from vtrain_wan.options import WanOptions

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from torch import Tensor

TOLERANCE = 1e-3
"""How far beyond [-1, 1] a pixel may be: resampling and bf16 rounding, not a range of [0, 255]."""


class WanCodec:
    """The VAE at work, SupportsDecoderOnly.

    The feature cache of its causal convolutions lives on the module, so one thread at a time is let in.
    """

    def __init__(self, vae: AutoencoderKLWan, config: CodecConfig) -> None:
        import torch

        self._vae: AutoencoderKLWan | None = vae
        self._config = config
        # There already: a copy from the host at each use would wait for the device.
        self._mean, self._std = (
            torch.tensor(numbers, device=vae.device).view(1, config.z_dim, 1, 1, 1)
            for numbers in (config.latents_mean, config.latents_std)
        )
        self._lock = threading.Lock()

    def encode(self, pixels: Tensor, *, std: bool = False) -> Latents:
        """mean = (posterior mode - latents_mean) / latents_std; std = the posterior's / latents_std.

        pixels (B, 3, F, H, W). Raises ValueError for another shape, frame count or range: the VAE would cut it in silence.
        """
        import torch

        self._check(pixels)
        with self._lock, torch.inference_mode():
            vae = self._open()
            if vae.encoder is None:
                raise RuntimeError("this video codec has let go of what encodes")
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            mean = (posterior.mode().float() - self._mean) / self._std
            spread = posterior.std.float() / self._std if std else None
        # Copied outside inference mode: its own tensors may not be saved for a backward pass.
        here = pixels.device
        return Latents(mean=mean.to(here).clone(), std=None if spread is None else spread.to(here).clone())

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, f, h, w) -> pixels, in the arithmetic and storage type of the pipeline, returned as fp32."""
        import torch

        with self._lock, torch.inference_mode():
            vae = self._open()
            stored = latents.to(vae.device, vae.dtype)
            mean, inverse = self._mean.to(stored), 1.0 / self._std.to(stored)
            # Divided by the inverse, as the pipeline does: times the std would be other last bits.
            pixels: Tensor = vae.decode(stored / inverse + mean, return_dict=False)[0]
        return pixels.float().to(latents.device).clone()

    def drop_encoder(self) -> None:
        """Free the half of the VAE that encodes, for good. Decoding stays the same, bit for bit."""
        with self._lock:
            vae = self._open()
            device = str(vae.device)
            vae.encoder = vae.quant_conv = None  # type: ignore[assignment]  # a module may be None
        Device.of(device).release()

    def close(self) -> None:
        """Let go of the weights."""
        self._vae = None

    def _open(self) -> AutoencoderKLWan:
        if self._vae is None:
            raise RuntimeError("this video codec is closed")
        return self._vae

    def _check(self, pixels: Tensor) -> None:
        factor, rule = self._config.scale_factor_spatial, self._config.frame_rule
        if pixels.ndim != 5 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(f"pixels are floats (B, 3, F, H, W), not {pixels.dtype} {tuple(pixels.shape)}")
        frames, height, width = pixels.shape[2:]
        if not rule.accepts(frames):
            raise ValueError(f"{frames} frames: the Wan VAE takes {rule}")
        if height % factor or width % factor:
            raise ValueError(f"{width}x{height}: the Wan VAE takes multiples of {factor}")
        largest = pixels.abs().max().item()
        if not largest <= 1 + TOLERANCE:  # so written, NaN is refused too
            raise ValueError(f"pixels are in [-1, 1], and one is {largest:g} in size")


@contextmanager
def open_codec(folder: Path, config: CodecConfig, options: WanOptions, device: str) -> Iterator[WanCodec]:
    """Load the VAE for the length of a with block. Raises ModelError."""
    codec = WanCodec(_load(folder, options, device), config)
    try:
        yield codec
    finally:
        codec.close()
        Device.of(device).release()


def _load(folder: Path, options: WanOptions, device: str) -> AutoencoderKLWan:
    from accelerate import init_empty_weights
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with init_empty_weights(include_buffers=False):
        vae: AutoencoderKLWan = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder))
    fill_module(vae, folder, "diffusion_pytorch_model", options.vae_precision, device)
    vae.to(device)  # type: ignore[arg-type]  # its wrapper hides self
    vae.eval().requires_grad_(False)
    if options.vae_tiling:
        vae.enable_tiling()
    return vae
