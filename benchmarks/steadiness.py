"""How steady a video of the tiny world is in time: two measures, one of features and one of pixels along the motion.

Neither knows the prompt, and a video that does not move is perfect by both: read them beside the judge's accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import efficientnet
import judge
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 20
"""Pixels, each way, around the shape that are followed along its path; shapes have radius 10.5 to 14."""


@dataclass(frozen=True)
class Steadiness:
    """Of some videos. likeness: mean over neighbouring frames; flicker: of 255 levels, over those `followed`, None if none is.

    videos, followed: how many there are, and in how many the judge sees one shape, so that there is a path.
    """

    videos: int
    likeness: float
    followed: int
    flicker: float | None


def steadiness(model: nn.Module, videos: list[np.ndarray]) -> Steadiness:
    """model: of efficientnet.load(). videos: uint8 (F, H, W, 3)."""
    flickers = [found for found in map(flicker, videos) if found is not None]
    mean = float(np.mean(flickers)) if flickers else None
    return Steadiness(len(videos), float(np.mean([likeness(model, each) for each in videos])), len(flickers), mean)


def likeness(model: nn.Module, video: np.ndarray) -> float:
    """Mean cosine of neighbouring frames' EfficientNet features, each frame's averaged over its places (as for naming it)."""
    side = efficientnet.SEEN // efficientnet.STRIDE
    with torch.no_grad():
        found = efficientnet.features(model, pictures(video), side, side).mean((1, 2))
        return float(F.cosine_similarity(found[1:], found[:-1], dim=-1).mean())


def flicker(video: np.ndarray) -> float | None:
    """Mean absolute change from frame to frame of a window that follows the shape's path, of 255 levels.

    The path is the straight, even one that fits the judge's centroids best. A shape that jumps, wobbles, swells or changes its
    colour changes in the window; one that moves as those of the world do stays there as it is, but for the interpolation
    between pixels. Pixels beyond the picture's edge are left out. None where the judge sees a shape in too few frames.
    """
    path = followed(video)
    if path is None:
        return None
    windows, inside = zip(
        *(window(frame, centre) for frame, centre in zip(pictures(video), path, strict=True)), strict=True
    )
    changes = []
    for number in range(1, len(windows)):
        both = inside[number] & inside[number - 1]
        changes.append(float((windows[number] - windows[number - 1]).abs()[:, both].mean()) * 127.5)
    return float(np.mean(changes))


def followed(video: np.ndarray) -> np.ndarray | None:
    """(F, 2): x and y of the path in each frame."""
    seen = [found for number, picture in enumerate(video) if (found := judge.sight(number, picture)) is not None]
    if len(seen) < max(2, judge.SEEN * len(video)):
        return None
    design = np.stack([[found.frame for found in seen], np.ones(len(seen))], axis=1)
    line = np.linalg.lstsq(design, np.array([found.middle for found in seen]), rcond=None)[0]
    return np.stack([np.arange(len(video)), np.ones(len(video))], axis=1) @ line


def window(picture: Tensor, centre: np.ndarray) -> tuple[Tensor, Tensor]:
    """What lies around centre (x, y) in picture (3, H, W): (3, n, n) for n = 2 WINDOW + 1, bilinear; and what of it is in there."""
    _, height, width = picture.shape
    offsets = torch.arange(-WINDOW, WINDOW + 1, dtype=torch.float32)
    y, x = torch.meshgrid(offsets + float(centre[1]), offsets + float(centre[0]), indexing="ij")
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    return F.grid_sample(picture[None], grid[None], mode="bilinear", align_corners=True)[0], inside


def pictures(video: np.ndarray) -> Tensor:
    """uint8 (F, H, W, 3) -> (F, 3, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2).float() / 127.5 - 1
