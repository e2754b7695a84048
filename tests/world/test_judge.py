"""The judge on true clips, which it must read without fault, and on everything else, which it must not read."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from vtrain.validate.videos import write_mp4

ALL_RIGHT = {"colour": True, "shape": True, "direction": True, "all": True}


def true_clips(world: ModuleType, count: int, seed: int) -> list[tuple]:
    """Words, all of them, with their frames; every fourth clip has 17."""
    rng = np.random.default_rng(seed)
    words = [world.any_words(rng) for _ in range(count)]
    return [(each, world.draw(world.stage(each, rng), 9 if place % 4 else 17)) for place, each in enumerate(words)]


def blurred(frames: np.ndarray, sigma: float) -> np.ndarray:
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    values = frames.astype(np.float64)
    for axis in (1, 2):
        padded = np.pad(values, [(4, 4) if place == axis else (0, 0) for place in range(4)], mode="edge")
        shifted = np.lib.stride_tricks.sliding_window_view(padded, 9, axis=axis)
        values = shifted @ (kernel / kernel.sum())
    return values


def bytes_of(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


def test_true_clips_are_read_without_fault(world: ModuleType, judge: ModuleType) -> None:
    for words, frames in true_clips(world, 300, seed=11):
        assert judge.judge(frames).hits(words) == ALL_RIGHT, words


def test_true_clips_of_diagonals_are_read_without_fault(world: ModuleType, judge: ModuleType) -> None:
    rng = np.random.default_rng(15)
    for words in (world.Words("red", shape, way) for way in world.DIAGONALS for shape in world.KNOWN_SHAPES):
        for _ in range(6):
            assert judge.judge(world.draw(world.stage(words, rng))).hits(words) == ALL_RIGHT, words


def test_true_clips_are_read_without_fault_with_blur_and_noise(world: ModuleType, judge: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for words, frames in true_clips(world, 80, seed=12):
        worn = bytes_of(blurred(frames, 1.3) + rng.normal(0, 8, frames.shape))
        assert judge.judge(worn).hits(words) == ALL_RIGHT, words


def test_true_clips_are_read_without_fault_from_the_files_that_are_trained_on(
    world: ModuleType, judge: ModuleType, tmp_path: Path
) -> None:
    world.write_clips(tmp_path, world.clips(48, seed=13))
    for number, (words, _) in enumerate(world.clips(48, seed=13)):
        assert judge.judge(judge.read(tmp_path / f"{number:05}.mp4")).hits(words) == ALL_RIGHT, words


def test_true_clips_are_read_without_fault_from_files_as_validation_writes_them(
    world: ModuleType, judge: ModuleType, tmp_path: Path
) -> None:
    for words, frames in true_clips(world, 60, seed=14):
        write_mp4(tmp_path / "clip.mp4", torch.from_numpy(frames), 8)
        assert judge.judge(judge.read(tmp_path / "clip.mp4")).hits(words) == ALL_RIGHT, words


@pytest.mark.parametrize("kind", ["uniform", "normal", "smooth", "over a grey"])
def test_noise_says_nothing(judge: ModuleType, kind: str) -> None:
    rng = np.random.default_rng(1)
    shape = (9, 64, 64, 3)
    for _ in range(10):
        values = {
            "uniform": lambda: rng.uniform(0, 255, shape),
            "normal": lambda: rng.normal(128, 60, shape),
            "smooth": lambda: 128 + 12 * (blurred(rng.normal(0, 60, shape), 2.5)),
            "over a grey": lambda: rng.normal(30, 25, shape),
        }[kind]()
        verdict = judge.judge(bytes_of(values))
        assert (verdict.colour, verdict.shape, verdict.direction).count(None) >= 2


@pytest.mark.parametrize("value", [0, 30, 128, 255])
def test_a_blank_clip_says_nothing(judge: ModuleType, value: int) -> None:
    blank = np.full((9, 64, 64, 3), value, dtype=np.uint8)
    assert judge.judge(blank) == judge.Verdict(None, None, None)


def test_a_picture_of_one_colour_says_nothing(world: ModuleType, judge: ModuleType) -> None:
    full = np.broadcast_to(np.array(world.COLOURS["red"], dtype=np.uint8), (9, 64, 64, 3))
    assert judge.judge(full) == judge.Verdict(None, None, None)


def test_a_frozen_clip_has_no_direction_but_colour_and_shape(world: ModuleType, judge: ModuleType) -> None:
    for words, frames in true_clips(world, 40, seed=15):
        for still in (0, 4, 8):
            verdict = judge.judge(np.repeat(frames[still : still + 1], 9, axis=0))
            assert verdict == judge.Verdict(words.colour, words.shape, None)


def test_a_clip_played_backwards_goes_the_other_way(world: ModuleType, judge: ModuleType) -> None:
    other = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for words, frames in true_clips(world, 40, seed=16):
        verdict = judge.judge(frames[::-1])
        assert verdict.direction == other[words.direction]
        assert not verdict.hits(words)["all"]


def test_frames_out_of_order_have_no_direction(world: ModuleType, judge: ModuleType) -> None:
    for _, frames in true_clips(world, 40, seed=17):
        order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
        assert judge.judge(frames[[place * (len(frames) // 9) for place in order]]).direction is None


def test_a_shape_that_jumps_at_the_end_has_no_direction(world: ModuleType, judge: ModuleType) -> None:
    for _, frames in true_clips(world, 40, seed=18):
        assert judge.judge(frames[[0] * 8 + [-1]]).direction is None


def test_a_slow_shape_and_a_path_between_two_directions_have_none(world: ModuleType, judge: ModuleType) -> None:
    rng = np.random.default_rng(19)
    for words in (world.any_words(rng) for _ in range(40)):
        scene = world.stage(words, rng)
        frames = world.draw(scene)
        slow = np.concatenate([frames[:2].repeat(5, axis=0)])
        assert judge.judge(slow).direction is None
        # 22.5 degrees off: half way to a diagonal.
        span = np.linspace(-0.5, 0.5, len(frames)) * scene.travel * np.tan(np.pi / 8)
        axis = 0 if words.direction in ("left", "right") else 1
        slant = np.stack([np.roll(frame, round(by), axis=axis) for frame, by in zip(frames, span, strict=True)])
        assert judge.judge(slant).direction is None


def test_a_colour_between_the_names_is_none_of_them(world: ModuleType, judge: ModuleType) -> None:
    for colour in ((255, 255, 255), (150, 150, 150), (60, 220, 220)):
        scene = world.stage(world.Words("red", "circle", "left"), np.random.default_rng(0))
        odd = world.Scene(**{**vars(scene), "colour": colour})
        verdict = judge.judge(world.draw(odd))
        assert verdict == judge.Verdict(None, "circle", "left")


def test_a_half_moon_a_bar_and_two_shapes_are_no_shape(world: ModuleType, judge: ModuleType) -> None:
    for _, frames in true_clips(world, 20, seed=20):
        background = frames[0, 0, 0]
        inside = (frames[4] != background).any(axis=-1)
        columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
        bar = frames[[4] * 9].copy()
        bar[:, :, columns[len(columns) // 2] :] = background
        assert judge.judge(bar).shape is None
        two = frames[[4] * 9].copy()
        two[:, rows[len(rows) // 2] - 2 : rows[len(rows) // 2] + 2] = background
        assert judge.judge(two) == judge.Verdict(None, None, None)
