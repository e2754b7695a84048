"""The measures of how steady a video is know the world's own motion from what is none, by a real frozen encoder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

Load = Callable[[str], ModuleType]
WORLD = Path(__file__).parents[2] / "examples" / "world"


@pytest.fixture
def steadiness(module: Load, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(WORLD))
    return module("steadiness")


@pytest.fixture
def clips(steadiness: ModuleType) -> list[np.ndarray]:
    """Four true clips."""
    world, random = sys.modules["world"], np.random.default_rng(5)
    return [world.draw(world.stage(words, random)) for words in world.combinations()[::8]]


def jumping(clip: np.ndarray, pixels: int) -> np.ndarray:
    """Each frame moved by so many pixels up or down, and left or right."""
    random = np.random.default_rng(1)
    return np.stack([np.roll(frame, tuple(random.choice((-pixels, pixels), 2)), (0, 1)) for frame in clip])


def brightening(clip: np.ndarray, share: float) -> np.ndarray:
    """Every second frame brighter."""
    return np.stack([(frame * (1 - share * (number % 2))).astype(np.uint8) for number, frame in enumerate(clip)])


def test_true_motion_hardly_flickers_and_what_jumps_or_brightens_does_and_more_with_more(
    steadiness: ModuleType, clips: list[np.ndarray]
) -> None:
    for clip in clips:
        true = steadiness.flicker(clip)
        assert true < 0.6
        jumps = [steadiness.flicker(jumping(clip, pixels)) for pixels in (1, 2, 3)]
        assert 5 * true < jumps[0] < jumps[1] < jumps[2]
        assert 5 * true < steadiness.flicker(brightening(clip, 0.05)) < steadiness.flicker(brightening(clip, 0.2))


def test_what_shows_no_shape_is_not_followed_and_counts_in_no_mean(
    steadiness: ModuleType, clips: list[np.ndarray]
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, clips[0].shape, dtype=np.uint8)
    assert steadiness.flicker(noise) is None
    net = sys.modules["efficientnet"].load()
    found = steadiness.steadiness(net, [clips[0], noise])
    assert (found.videos, found.followed) == (2, 1)
    assert found.flicker == pytest.approx(steadiness.flicker(clips[0]))
    assert steadiness.steadiness(net, [noise]).flicker is None


def test_features_of_neighbouring_frames_are_alike_where_motion_is_true(
    steadiness: ModuleType, clips: list[np.ndarray]
) -> None:
    net = sys.modules["efficientnet"].load()
    mean = {
        kind: np.mean([steadiness.likeness(net, change(clip)) for clip in clips])
        for kind, change in (
            ("true", lambda clip: clip),
            ("jumping", lambda clip: jumping(clip, 3)),
            ("dark and bright", lambda clip: brightening(clip, 0.4)),
            ("still", lambda clip: clip[[0] * len(clip)]),
        )
    }
    assert mean["jumping"] < mean["true"] < mean["still"]
    assert mean["dark and bright"] < mean["true"]
    assert mean["still"] == pytest.approx(1, abs=1e-5)


def test_the_encoder_has_a_feature_for_each_token_and_knows_what_it_sees(module: Load) -> None:
    import torch

    from vtrain.contract import TokenGrid

    net = module("efficientnet")
    encoder = net.Lite0()
    assert encoder.grid(TokenGrid(3, 4, 6)) == (4, 6)
    assert list(encoder.check()) == []
    left = torch.full((1, 3, 64, 96), -0.5)
    left[..., :32] = torch.rand(3, 64, 32, generator=torch.Generator().manual_seed(0))
    with encoder.open("cpu") as encode, torch.no_grad():
        plain, marked = (encode(picture, TokenGrid(3, 4, 6)) for picture in (torch.full_like(left, -0.5), left))
    assert marked.shape == (1, 4, 6, net.WIDTH)
    changed = (marked - plain).norm(dim=-1)[0].mean(0)
    assert changed[:2].min() > 2 * changed[4:].max(), "what is drawn on the left changes the left of the grid"
