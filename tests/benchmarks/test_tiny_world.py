"""What the tiny world's table trains on beside the world's own clips."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

Load = Callable[[str], ModuleType]
WORLD = Path(__file__).parents[2] / "examples" / "world"


@pytest.fixture
def tiny_world(module: Load, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(WORLD))
    return module("tiny_world")


def test_spoilt_clips_are_the_worlds_but_for_noise_that_their_masks_leave_out(
    tiny_world: ModuleType, tmp_path: Path
) -> None:
    world, judge = sys.modules["world"], sys.modules["judge"]
    world.write_clips(tmp_path / "clips", world.clips(12, seed=0))
    tiny_world.spoil(tmp_path)
    corners = set()
    for number in range(12):
        names = [tmp_path / kind / f"{number:05}" for kind in ("clips", "spoilt")]
        clean, spoilt = (judge.read(name.with_suffix(".mp4")).astype(int) for name in names)
        mask = np.asarray(Image.open(tmp_path / "spoilt" / "masks" / f"{number:05}.png")) > 127
        assert (~mask).sum() == tiny_world.BLACK**2
        assert np.abs(clean - spoilt)[:, ~mask].mean() > 20
        assert np.abs(clean - spoilt)[:, mask].mean() < 1
        assert names[0].with_suffix(".txt").read_text() == names[1].with_suffix(".txt").read_text()
        corners.add((bool(mask[0, 0]), bool(mask[0, -1]), bool(mask[-1, 0]), bool(mask[-1, -1])))
    assert len(corners) == 4
