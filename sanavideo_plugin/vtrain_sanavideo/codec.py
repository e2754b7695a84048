"""Pixels to latents and back through the checkpoint's VAE, normalised as SanaVideoPipeline does.

The 480p checkpoint has the Wan VAE, whose config holds the latents' mean and std; the 720p one has the LTX-2 video VAE, which has
them among its weights.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vtrain.contract import Device, Latents, ModelError, Problem, fill_module, stored_numbers
from vtrain_sanavideo.geometry import AnyCodecConfig, CodecConfig, Ltx2CodecConfig
from vtrain_sanavideo.options import SanaVideoOptions

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from torch import Tensor

    VaeT = TypeVar("VaeT", AutoencoderKLWan, AutoencoderKLLTX2Video)

WEIGHTS = "diffusion_pytorch_model"
LTX2_STATISTICS = ("latents_mean", "latents_std")

TOLERANCE = 1e-3
"""How far beyond [-1, 1] a pixel may be: resampling and bf16 rounding, not a range of [0, 255]."""


Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and std, one number for each channel."""


class SanaVideoCodec:
    """The VAE at work, SupportsDecoderOnly. statistics: mean and std of each channel of its latents.

    The feature cache of the Wan VAE's causal convolutions lives on the module, so one thread at a time is let in.
    """

    def __init__(
        self, vae: AutoencoderKLWan | AutoencoderKLLTX2Video, config: AnyCodecConfig, statistics: Statistics
    ) -> None:
        import torch

        self._vae: AutoencoderKLWan | AutoencoderKLLTX2Video | None = vae
        self._config = config
        # There already: a copy from the host at each use would wait for the device.
        self._mean, self._std = (
            torch.tensor(numbers, device=vae.device).view(1, config.channels, 1, 1, 1) for numbers in statistics
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
            vae.encoder = None  # type: ignore[assignment]  # a module may be None
            if isinstance(self._config, CodecConfig):
                vae.quant_conv = None  # type: ignore[assignment]
        Device.of(device).release()

    def close(self) -> None:
        """Let go of the weights."""
        self._vae = None

    def _open(self) -> AutoencoderKLWan | AutoencoderKLLTX2Video:
        if self._vae is None:
            raise RuntimeError("this video codec is closed")
        return self._vae

    def _check(self, pixels: Tensor) -> None:
        factor, rule = self._config.space_factor, self._config.frame_rule
        if pixels.ndim != 5 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(f"pixels are floats (B, 3, F, H, W), not {pixels.dtype} {tuple(pixels.shape)}")
        frames, height, width = pixels.shape[2:]
        if not rule.accepts(frames):
            raise ValueError(f"{frames} frames: the {self._config.name} takes {rule}")
        if height % factor or width % factor:
            raise ValueError(f"{width}x{height}: the {self._config.name} takes multiples of {factor}")
        largest = pixels.abs().max().item()
        if not largest <= 1 + TOLERANCE:  # so written, NaN is refused too
            raise ValueError(f"pixels are in [-1, 1], and one is {largest:g} in size")


class Ltx2Codec(SanaVideoCodec):
    """The LTX-2 video VAE at work."""

    def decode(self, latents: Tensor) -> Tensor:
        """As the Wan VAE's, which ends in [-1, 1] by itself; SanaVideoPipeline cuts this one's pixels when it shows them."""
        return super().decode(latents).clamp(-1, 1)


@contextmanager
def open_codec(
    folder: Path, config: AnyCodecConfig, options: SanaVideoOptions, device: str
) -> Iterator[SanaVideoCodec]:
    """Load the VAE for the length of a with block. Raises ModelError."""
    codec = _codec(folder, config, options, device)
    try:
        yield codec
    finally:
        codec.close()
        Device.of(device).release()


def _codec(folder: Path, config: AnyCodecConfig, options: SanaVideoOptions, device: str) -> SanaVideoCodec:
    if isinstance(config, Ltx2CodecConfig):
        from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video

        # From the file, in full: the module's own are in the storage type of its weights.
        statistics = ltx2_statistics(folder, config)
        return Ltx2Codec(_load(AutoencoderKLLTX2Video, folder, options, device), config, statistics)
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    statistics = config.latents_mean, config.latents_std
    return SanaVideoCodec(_load(AutoencoderKLWan, folder, options, device), config, statistics)


def _load(kind: type[VaeT], folder: Path, options: SanaVideoOptions, device: str) -> VaeT:
    from accelerate import init_empty_weights

    of: Any = kind
    with init_empty_weights(include_buffers=False):
        vae: VaeT = of.from_config(of.load_config(folder))
    fill_module(vae, folder, WEIGHTS, options.vae_precision, device)
    vae.to(device)  # type: ignore[arg-type]  # its wrapper hides self
    vae.eval().requires_grad_(False)
    if options.vae_tiling:
        vae.enable_tiling()
    return vae


def ltx2_statistics(folder: Path, config: Ltx2CodecConfig) -> Statistics:
    """Mean and std of the latents, from the weights. No torch. Raises ModelError if they are not there, or cannot be."""
    found = stored_numbers(folder, WEIGHTS, LTX2_STATISTICS)
    faults = [
        f"{name} has {len(found[name])} numbers, and latent_channels asks for {config.channels}."
        if name in found
        else f"{name} is missing: SanaVideoPipeline normalises latents with it."
        for name in LTX2_STATISTICS
        if len(found.get(name, ())) != config.channels
    ]
    mean, std = (found.get(name, ()) for name in LTX2_STATISTICS)
    if not faults and not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
        faults.append("latents_mean and latents_std must be finite, and latents_std more than 0.")
    if faults:
        raise ModelError(Problem(str(folder), fault, "Take the VAE's own weights.") for fault in faults)
    return mean, std
