"""Clean latents of a batch: as they are cached, or drawn anew from their mean and std at each use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtrain.contract import Latents
from vtrain.data.seeds import generator


def drawn(seed: int, clips: Sequence[Latents], draws: Sequence[int]) -> Tensor:
    """(B, C, f, h, w) fp32 of clips (1, C, f, h, w) of one shape. draws: their draw numbers.

    Of a clip with a std: mean + std * noise, the noise a pure function of (seed, draw number); of one without: its mean.
    """
    means = [
        clip.mean if clip.std is None else _draw(seed, clip, draw) for clip, draw in zip(clips, draws, strict=True)
    ]
    return means[0] if len(means) == 1 else torch.cat(means)  # nothing is copied for a batch of one


def _draw(seed: int, clip: Latents, draw: int) -> Tensor:
    assert clip.std is not None
    noise = torch.randn(clip.mean.shape, generator=generator(seed, "latents", draw))
    return torch.addcmul(clip.mean, clip.std, noise)
