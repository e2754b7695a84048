"""Clean latents of a batch: as they are cached, or drawn anew from their mean and std at each use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtrain.contract import Latents
from vtrain.data.seeds import generator


def drawn(seed: int, clips: Latents, draws: Sequence[int]) -> Tensor:
    """(B, C, f, h, w) fp32 of as many clips. draws: their draw numbers.

    Of clips with a std: mean + std * noise, the noise a pure function of (seed, draw number); without: the mean.
    """
    if clips.std is None:
        return clips.mean
    shape = clips.mean.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=generator(seed, "latents", draw)) for draw in draws])
    return torch.addcmul(clips.mean, clips.std, noise)
