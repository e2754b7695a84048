"""Video codecs of diffusers whose latents are normalised by a mean and a std per channel: AutoencoderKLWan and its like.

The autoencoder's class comes from the plugin. Importing this module imports neither torch nor diffusers.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import Field

from vtrain.contract.checkpoints import JsonObject, PartConfig, Positive, read_config
from vtrain.contract.device import Device
from vtrain.contract.errors import ModelError, Problem
from vtrain.contract.geometry import FrameRule, LatentGeometry
from vtrain.contract.loading import load_module
from vtrain.contract.protocols import DType
from vtrain.contract.records import Latents
from vtrain.contract.weights import Shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

TOLERANCE = 1e-3
"""How far beyond [-1, 1] a pixel may be: resampling and bf16 rounding, not a range of [0, 255]."""


class CodecConfig(Protocol):
    """config.json of a video codec, as far as any is asked."""

    @property
    def time_factor(self) -> int:
        """Pixel frames per latent frame, the first apart."""
        ...

    @property
    def space_factor(self) -> int:
        """Pixels per latent in height and width."""
        ...

    def geometry(self, patch: tuple[int, int, int] = (1, 1, 1)) -> LatentGeometry:
        """patch: the denoiser's, latents per token."""
        ...

    def shapes(self) -> dict[str, Shape]:
        """Of the weights that bear the config's numbers, for `misfit_problems(some=True)`."""
        ...


class CausalCodecConfig(PartConfig):
    """config.json of an AutoencoderKLWan, over its class's own defaults."""

    base_dim: Positive
    decoder_base_dim: Positive | None
    in_channels: Positive
    out_channels: Positive
    z_dim: Positive
    dim_mult: tuple[Positive, ...] = Field(min_length=1)
    temperal_downsample: tuple[bool, ...]
    patch_size: Positive | None
    latents_mean: tuple[float, ...]
    latents_std: tuple[Annotated[float, Field(gt=0)], ...]
    scale_factor_temporal: Positive | None
    scale_factor_spatial: Positive | None

    @property
    def time_factor(self) -> int:
        """Pixel frames per latent frame, the first apart: each downsampling stage that is marked halves the frames."""
        return 1 << sum(self.temperal_downsample)

    @property
    def space_factor(self) -> int:
        """Pixels per latent in height and width: a halving between each two of dim_mult, times the pixel patch."""
        return (1 << (len(self.dim_mult) - 1)) * (self.patch_size or 1)

    @property
    def memory_key(self) -> str:
        """What in it decides over what it computes: its key in a family's measurements (contract/measured.py)."""
        widths = f"{self.base_dim} {self.decoder_base_dim or self.base_dim} {'x'.join(map(str, self.dim_mult))}"
        return f"codec {widths} {self.z_dim}"

    def geometry(self, patch: tuple[int, int, int] = (1, 1, 1)) -> LatentGeometry:
        """The codec is causal: the first frame stands alone, then time_factor frames share a latent frame.

        patch: the denoiser's, latents per token.
        """
        return LatentGeometry(self.z_dim, FrameRule(stride=self.time_factor, offset=1), self.space_factor, patch)

    def shapes(self) -> dict[str, Shape]:
        """Of the weights that bear the config's numbers, for `misfit_problems(some=True)`."""
        z, inner, outer = self.z_dim, self.base_dim, self.decoder_base_dim or self.base_dim
        return {
            "encoder.conv_in.weight": (inner, self.in_channels, 3, 3, 3),
            "quant_conv.weight": (2 * z, 2 * z, 1, 1, 1),
            "post_quant_conv.weight": (z, z, 1, 1, 1),
            "decoder.conv_in.weight": (outer * self.dim_mult[-1], z, 3, 3, 3),
            "decoder.conv_out.weight": (self.out_channels, outer * self.dim_mult[0], 3, 3, 3),
        }

    def faults(self) -> list[str]:
        """What in the config contradicts itself."""
        pairs = (
            ("scale_factor_temporal", self.scale_factor_temporal, self.time_factor, "temperal_downsample gives"),
            ("scale_factor_spatial", self.scale_factor_spatial, self.space_factor, "dim_mult and patch_size give"),
            ("latents_mean", len(self.latents_mean), self.z_dim, "z_dim asks for"),
            ("latents_std", len(self.latents_std), self.z_dim, "z_dim asks for"),
        )
        return [f"{name}: {said}, but {why} {is_}." for name, said, is_, why in pairs if said not in (None, is_)]


def read_codec(folder: Path, defaults: JsonObject) -> CausalCodecConfig:
    """The codec's config. defaults: its class's own. Raises ModelError."""
    config = read_config(CausalCodecConfig, folder / "config.json", defaults)
    if faults := config.faults():
        raise ModelError(Problem(str(folder / "config.json"), fault, "Take the VAE's own config.") for fault in faults)
    return config


def load_autoencoder(kind: type[nn.Module], folder: Path, dtype: DType, device: str, *, tiling: bool = False) -> Any:
    """A frozen autoencoder of diffusers. tiling: large videos in tiles. Raises ModelError."""
    vae: Any = load_module(kind, folder, dtype, device).requires_grad_(False)
    if tiling:
        vae.enable_tiling()
    return vae


class NormalizedCodec:
    """A video autoencoder of diffusers at work: a `VideoCodec`, and SupportsDecoderOnly. For a with block: `opened`.

    vae: the module, whose `encode` gives a distribution. mean, std: of latents, one number per channel. geometry: what it takes.
    title: of it in messages, such as "the Wan VAE". Causal convolutions keep a feature cache on the module, so one thread at a
    time is let in.
    """

    def __init__(
        self,
        vae: Any,
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        geometry: LatentGeometry,
        title: str,
    ) -> None:
        import torch

        self._vae: Any | None = vae
        self._geometry, self._title = geometry, title
        # There already: a copy from the host at each use would wait for the device.
        self._mean, self._std = (
            torch.as_tensor(numbers, device=vae.device).view(1, geometry.channels, 1, 1, 1) for numbers in (mean, std)
        )
        self._lock = threading.Lock()

    def encode(self, pixels: Tensor, *, std: bool = False) -> Latents:
        """mean = (the posterior's mode - mean) / std; std = the posterior's / std.

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
        """latents (B, C, f, h, w) -> pixels, in the arithmetic and storage type of diffusers' pipelines, returned as fp32."""
        import torch

        with self._lock, torch.inference_mode():
            vae = self._open()
            stored = latents.to(vae.device, vae.dtype)
            mean, inverse = self._mean.to(stored), 1.0 / self._std.to(stored)
            # Divided by the inverse, as the pipelines do: times the std would be other last bits.
            pixels: Tensor = vae.decode(stored / inverse + mean, return_dict=False)[0]
        return pixels.float().to(latents.device).clone()

    def drop_encoder(self) -> None:
        """Free the half of the VAE that encodes, for good. Decoding stays the same, bit for bit."""
        with self._lock:
            vae = self._open()
            device = str(vae.device)
            vae.encoder = None
            if hasattr(vae, "quant_conv"):
                vae.quant_conv = None
        Device.of(device).release()

    def close(self) -> None:
        """Let go of the weights."""
        self._vae = None

    def _open(self) -> Any:
        if self._vae is None:
            raise RuntimeError("this video codec is closed")
        return self._vae

    def _check(self, pixels: Tensor) -> None:
        factor, rule = self._geometry.space_factor, self._geometry.frame_rule
        if pixels.ndim != 5 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(f"pixels are floats (B, 3, F, H, W), not {pixels.dtype} {tuple(pixels.shape)}")
        frames, height, width = pixels.shape[2:]
        if not rule.accepts(frames):
            raise ValueError(f"{frames} frames: {self._title} takes {rule}")
        if height % factor or width % factor:
            raise ValueError(f"{width}x{height}: {self._title} takes multiples of {factor}")
        largest = pixels.abs().max().item()
        if not largest <= 1 + TOLERANCE:  # so written, NaN is refused too
            raise ValueError(f"pixels are in [-1, 1], and one is {largest:g} in size")
