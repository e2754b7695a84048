"""The generator of the tiny world's clips."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "world" / "world.py"


def clip(world: ModuleType, *words: str, seed: int = 0, frames: int = 9) -> np.ndarray:
    drawn: np.ndarray = world.draw(world.stage(world.Words(*words), np.random.default_rng(seed)), frames)
    return drawn


def test_no_held_out_combination_and_no_new_word_is_in_the_training_set(world: ModuleType) -> None:
    seen = {words for words, _ in world.clips(384, seed=0)}
    assert len(seen) == 24
    assert not any(world.held_out(words) for words in seen)
    assert not any(words.colour == world.NEW_COLOUR or words.shape == world.NEW_SHAPE for words in seen)


def test_every_word_and_every_pair_of_words_is_trained_in_some_combination(world: ModuleType) -> None:
    seen = [words for words in world.combinations() if not world.held_out(words)]
    for one in ("colour", "shape", "direction"):
        for other in ("colour", "shape", "direction"):
            known = {(getattr(words, one), getattr(words, other)) for words in world.combinations()}
            trained = {(getattr(words, one), getattr(words, other)) for words in seen}
            assert trained == known
    assert sum(map(world.held_out, world.combinations())) == 8


def test_combinations_are_trained_equally_often(world: ModuleType) -> None:
    counts = Counter(world.training_words(384, np.random.default_rng(0)))
    assert set(counts.values()) == {16}


def test_the_same_seed_draws_the_same_pixels_and_another_seed_others(world: ModuleType) -> None:
    first, again, other = (list(world.clips(4, seed=seed)) for seed in (1, 1, 2))
    assert all((one[1] == two[1]).all() and one[0] == two[0] for one, two in zip(first, again, strict=True))
    assert any((one[1] != two[1]).any() for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("frames", [9, 17])
def test_shapes_stay_in_the_picture_and_move_as_far_whatever_the_frames(world: ModuleType, frames: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        words = world.any_words(rng)
        drawn = world.draw(world.stage(words, rng), frames).astype(int)
        border = np.concatenate(
            [drawn[:, [0, -1]].reshape(frames, -1, 3), drawn[:, :, [0, -1]].reshape(frames, -1, 3)], 1
        )
        assert (border == border[0, 0]).all()
        inside = np.abs(drawn - border[0, 0]).sum(axis=-1) > 90
        axis = 1 if words.direction in ("up", "down") else 2
        first, last = (np.flatnonzero(inside[frame].any(axis=2 - axis)).mean() for frame in (0, -1))
        assert 20 <= abs(last - first) <= 34


def test_edges_are_drawn_with_the_area_of_the_shape(world: ModuleType) -> None:
    offset = np.arange(64) + 0.5 - 32.3
    x, y = offset[None, :], offset[:, None]
    for shape, area in (("circle", np.pi), ("square", 1.84**2), ("triangle", 2.0)):
        assert world.coverage(shape, x, y, 12.0).sum() == pytest.approx(area * 12**2, rel=0.01)


def test_the_command_writes_clips_and_captions_that_read_back(world: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "clips"), "--clips", "3", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "3 clips of 9 frames" in done.stdout
    for number, (words, frames) in enumerate(world.clips(3, seed=5)):
        path = tmp_path / "clips" / f"{number:05}.mp4"
        assert path.with_suffix(".txt").read_text(encoding="utf-8") == f"{words.caption}\n"
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == 8
            read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert read.shape == frames.shape == (9, 64, 64, 3)
        assert np.abs(read.astype(int) - frames).mean() < 2


def test_a_frame_count_that_the_vae_would_cut_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--frames", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "5, 9, 13, 17" in done.stderr
