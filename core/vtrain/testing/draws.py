"""Inputs that the kit's tests make: always the same for the same arguments, and no use of torch's global generator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vtrain.contract import ClipShape, NoiseLevel, Text


def required(fixture: str, meaning: str) -> NoReturn:
    """Fail with what the author still has to give."""
    pytest.fail(f"Give a fixture `{fixture}`: {meaning}.", pytrace=False)


def noise(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Standard normal, fp32, on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def moving_picture(clip: ClipShape, batch: int = 1, seed: int = 0) -> Tensor:
    """(B, 3, F, H, W) fp32 in [-0.9, 0.9]: random colours on a coarse grid that change over time, smooth in between."""
    coarse = noise((batch, 3, min(3, clip.frames), 3, 4), seed).tanh() * 0.9
    return F.interpolate(coarse, size=tuple(clip), mode="trilinear", align_corners=False)


def level_of(sigmas: Sequence[float], timestep_scale: float = 1000.0) -> NoiseLevel:
    """One level for each clip; the timestep is timestep_scale x sigma."""
    sigma = torch.tensor(sigmas, dtype=torch.float32)
    return NoiseLevel(sigma=sigma, timestep=sigma * timestep_scale)


def padded(text: Text, tokens: int) -> Text:
    """Text padded with zeros to `tokens`, as denoisers get it."""
    missing = tokens - text.mask.shape[1]
    return Text(embeds=F.pad(text.embeds, (0, 0, 0, missing)), mask=F.pad(text.mask, (0, missing), value=False))


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value of `wanted`. Infinite where either is not finite."""
    if found.shape != wanted.shape or not (found.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    difference = (found.double() - wanted.double()).abs().max()
    return float(difference / wanted.double().abs().max().clamp(min=1e-12))


def digest(file: Path) -> str:
    """A HashFile: of the file's bytes."""
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
