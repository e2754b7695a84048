"""Which draws are image-to-video: a pure function of the seed and the draw number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vtrain.data.batches import Batches
from vtrain.data.caching.caches import Caches, fill_caches
from vtrain.data.scanning.scan import scan
from vtrain.data.seeds import chance


@pytest.fixture
def batches(setup: Any, make_video: Any) -> Any:
    """Batches over a dataset of clips and one of images, each with a share of its own."""
    for number in range(3):
        setup.add(f"{number}.mp4", make_video(frames=27 + number))
    other = setup.root / "stills"
    other.mkdir()
    (other / "still.mp4").write_bytes(make_video(frames=1))
    (other / "still.txt").write_text("a still", encoding="utf-8")

    def make(share: float, **train: Any) -> Batches:
        clips = replace(setup.dataset(), image_to_video=share)
        stills = replace(setup.dataset("stills", other, frames=1), image_to_video=share)
        plan = setup.plan(clips, stills, **train)
        filled = fill_caches(plan, scan(plan).samples, [], "cpu", lambda *_: None)
        return Batches(plan, Caches.open(plan), filled.index)

    return make


def draws(batches: Batches, count: int) -> dict[int, tuple[str, bool]]:
    found = {}
    for number in range(count):
        batch = batches[number]
        for draw, name, clean in zip(batch.draws, batch.sample_ids, batch.clean, strict=True):
            found[draw] = (name, clean == 1)
    return found


def test_the_share_of_draws_is_about_that_asked_for_and_images_are_never_among_them(batches: Any) -> None:
    found = draws(batches(0.3), 800)
    clips = [first for name, first in found.values() if name.startswith("clips/")]
    stills = [first for name, first in found.values() if name.startswith("stills/")]
    assert len(clips) == 600
    assert 0.25 < sum(clips) / len(clips) < 0.35
    assert len(stills) == 200
    assert not any(stills)


def test_none_and_all(batches: Any) -> None:
    assert not any(first for _, first in draws(batches(0.0), 40).values())
    every = draws(batches(1.0), 40)
    assert all(first == name.startswith("clips/") for name, first in every.values())


def test_a_draw_depends_on_the_seed_and_its_number_alone(batches: Any) -> None:
    one = draws(batches(0.5), 40)
    assert all(
        first == (chance(1, "image_to_video", draw) < 0.5)
        for draw, (name, first) in one.items()
        if name.startswith("clips/")
    )
    again = draws(batches(0.5), 40)
    assert again == one
    assert draws(batches(0.5, caption_dropout=0.9), 40) == one
    pairs = draws(batches(0.5, batch_size=3), 10)
    assert len(pairs.keys() & one.keys()) > 20
    assert all(pairs[draw] == one[draw] for draw in pairs.keys() & one.keys())
    assert {k: v[1] for k, v in draws(batches(0.5, seed=2), 40).items()} != {k: v[1] for k, v in one.items()}


def test_a_smaller_share_draws_a_part_of_what_a_larger_one_draws(batches: Any) -> None:
    few, many = draws(batches(0.2), 60), draws(batches(0.6), 60)
    assert {draw for draw, (_, first) in few.items() if first} < {draw for draw, (_, first) in many.items() if first}
