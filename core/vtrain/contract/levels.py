"""Noise levels as a denoiser is given them: with timesteps in its family's own unit, and clean frames among noisy ones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vtrain.contract.protocols import Family, SupportsFrameLevels
from vtrain.contract.records import NoiseLevel

if TYPE_CHECKING:
    from torch import Tensor


def timed(family: Family, level: NoiseLevel) -> NoiseLevel:
    """The same level with its timestep: the sampler's own where it gave one, else the family's. *torch*"""
    return replace(level, timestep=family.timestep(level.sigma)) if level.timestep is None else level


def timesteps(level: NoiseLevel) -> Tensor:
    """The timesteps of a level that has them, as each has that a denoiser is given. Raises ValueError for one without."""
    if level.timestep is None:
        raise ValueError("a level without timesteps: `timed` gives it the family's own")
    return level.timestep


def with_clean(family: Family, level: NoiseLevel, clean: Tensor) -> NoiseLevel:
    """A level for each latent frame: 0, with the family's timestep for it, where clean (B, f) bool says so. *torch*

    level: (B,), (B, f), or (B, g) of the last g frames alone where those before them are clean.
    """
    zero = level.sigma.new_zeros(1)
    times = timesteps(timed(family, level))
    return NoiseLevel(_by_frame(level.sigma, clean, zero), _by_frame(times, clean, family.timestep(zero)))


def _by_frame(values: Tensor, clean: Tensor, of_clean: Tensor) -> Tensor:
    """Levels or timesteps as `with_clean` takes them -> (B, f), `of_clean` (1,) where clean."""
    frames = clean.shape[1]
    each = values[:, None].expand(-1, frames) if values.ndim == 1 else values
    whole = of_clean.expand(len(each), frames).clone()
    whole[:, frames - each.shape[1] :] = each
    return whole.where(~clean, of_clean)


def takes_frame_levels(family: Family) -> bool:
    """Whether the family's denoiser takes a level for each latent frame, in which clean frames can stand among noisy ones."""
    return isinstance(family, SupportsFrameLevels) and family.frame_levels
