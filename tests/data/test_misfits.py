"""Clips that lose much of their pictures in their buckets: what is said of them, and the buckets that would fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vtrain.config.data_tables import DataTable
from vtrain.contract import Size
from vtrain.data.scanning.misfits import Misfits, pointed_out
from vtrain.plan.records import DatasetPlan

WIDE, TALL, SQUARE = Size(832, 480), Size(480, 832), Size(640, 640)
FAMILY: Any = SimpleNamespace(
    pixel_stride=32,
    resolutions=lambda: {"480p": (WIDE, TALL, SQUARE), "720p": (Size(1280, 704), Size(704, 1280))},
)


def dataset(*sizes: Size, **table: Any) -> DatasetPlan:
    backend: Any = SimpleNamespace(location="/clips")
    return DatasetPlan(
        "clips", "config.toml:1", backend, DataTable.model_validate(table), sizes or (WIDE,), 17, 17, 16.0
    )


def words(plan: DatasetPlan, *aspects: tuple[float, int], worst: tuple[tuple[str, float], ...] = ()) -> str:
    """aspects: with the number of clips."""
    return pointed_out(FAMILY, plan, Misfits(sum(count for _, count in aspects), worst, aspects), clips=40)


def test_portrait_clips_in_a_landscape_bucket_are_pointed_out_with_the_set_that_fits_them() -> None:
    worst = (("tall.mp4", 0.584), ("tower.mp4", 0.41))
    assert words(dataset(resolution="832x480"), (0.56, 2), worst=worst) == (
        "2 of 40 clips lose more than a third of the picture to the crop (tall.mp4 58%, tower.mp4 41%); "
        'data.resolution = "480p" has buckets that fit'
    )


def test_stretched_clips_are_pointed_out_in_their_own_words() -> None:
    said = words(dataset(crop="none"), (0.56, 1), worst=(("tall.mp4", 1.37),))
    assert said.startswith("1 of 40 clips is stretched by more than a third (tall.mp4 137%); ")


@pytest.mark.parametrize(
    ("sizes", "aspects", "remedy"),
    [
        # A size that no set has beside the dataset's own, which are not the family's.
        ([Size(960, 544)], [(0.56, 2)], 'to fit them, add "544x960" to data.resolution'),
        # The most clips first.
        ([WIDE], [(0.56, 2), (4.0, 5)], 'to fit them, add "1280x320" and "480x832" to data.resolution'),
        # The set is what is trained on, and has nothing as wide.
        ([WIDE, TALL, SQUARE], [(4.0, 5)], 'to fit them, add "1280x320" to data.resolution'),
    ],
)
def test_buckets_are_proposed_that_would_fit(sizes: list[Size], aspects: list[tuple[float, int]], remedy: str) -> None:
    said = words(dataset(*sizes, resolution=tuple(map(str, sizes))), *aspects)
    assert said.endswith(f"; {remedy}")
    assert words(dataset(*sizes), *aspects).endswith(f"; {remedy}, as a list of sizes")


def test_a_picture_that_downsample_to_leaves_too_large_needs_no_other_bucket() -> None:
    plan = dataset(max_size=900, downsample_to=900)
    assert words(plan, (1.73, 2)).endswith("; a smaller data.downsample_to would crop less")
