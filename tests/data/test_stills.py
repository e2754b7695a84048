"""Images and folders of images in a dataset, from listing to latents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vtrain.data.caching.caches import fill_caches
from vtrain.data.decoding.decode import unit_range
from vtrain.data.scanning.scan import scan
from vtrain_builtin.frames import FRAMES


def picture(k: int) -> np.ndarray:
    x, y = np.meshgrid(np.arange(64), np.arange(32))
    return np.stack([3 * x + 4 * k, 7 * y, np.full_like(x, 10 * k)], -1).astype(np.uint8)


def averaged(pictures: list[np.ndarray]) -> torch.Tensor:
    """The latents that the tests' codec makes of these frames at their own size."""
    pixels = unit_range(torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2))
    return torch.nn.functional.avg_pool3d(pixels[:, ::4], (1, 8, 8))


def filled(setup, dataset):
    plan = setup.plan(dataset)
    found = scan(plan)
    done = fill_caches(plan, found.samples, (), "cpu", lambda _: None)
    return done, list(found.samples), found.survey.datasets[0]


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff"])
def test_an_image_is_a_clip_of_one_frame_where_the_table_says_so(setup, suffix) -> None:
    file = setup.add(f"a.{suffix}", b"")
    Image.fromarray(picture(3)).save(file, **({"lossless": True} if suffix == "webp" else {}))
    done, (sample,), _ = filled(setup, setup.dataset(sizes=[(64, 32)], frames=17, min_frames=1, images=True))
    assert (sample.ref_id, sample.shape.frames) == (f"a.{suffix}", 1)
    assert torch.equal(done.caches.latents(sample, 0.0).mean[0], averaged([picture(3)]))


def test_without_that_it_is_left_out_with_the_key_that_would_use_it(setup, make_video) -> None:
    setup.add("b.mp4", make_video(frames=27))
    Image.fromarray(picture(3)).save(setup.add("a.png", b""))
    _, samples, survey = filled(setup, setup.dataset())
    assert [sample.ref_id for sample in samples] == ["b.mp4"]
    ((reason, left),) = survey.skipped.items()
    assert "data.images = true" in reason
    assert left == (1, "a.png")


def test_a_folder_of_images_gives_the_latents_of_these_images(setup) -> None:
    shot = setup.folder / "shot_01"
    shot.mkdir()
    for k in range(20):
        Image.fromarray(picture(k)).save(shot / f"frame-{k + 95}.png")
    (setup.folder / "shot_01.txt").write_text("a ramp that brightens")
    table = setup.dataset(sizes=[(64, 32)], frames=17)
    backend = FRAMES.build(FRAMES.options(path=str(setup.folder), fps=16.0))
    done, (sample,), survey = filled(setup, dataclasses.replace(table, backend=backend))
    assert (sample.ref_id, sample.captions[0].text) == ("shot_01.mov", "a ramp that brightens")
    assert torch.equal(done.caches.latents(sample, 0.0).mean[0], averaged([picture(k) for k in range(17)]))
    assert survey.skipped == {}


def test_a_damaged_image_in_the_middle_is_told_with_both_counts(setup) -> None:
    shot = setup.folder / "shot"
    shot.mkdir()
    for k in range(20):
        Image.fromarray(picture(k)).save(shot / f"{k}.png")
    Path(shot / "8.png").write_bytes(b"not an image")
    (setup.folder / "shot.txt").write_text("a ramp")
    for k in range(20):
        (setup.folder / "good").mkdir(exist_ok=True)
        Image.fromarray(picture(k)).save(setup.folder / "good" / f"{k}.png")
    (setup.folder / "good.txt").write_text("a ramp")
    table = setup.dataset(sizes=[(64, 32)], frames=17)
    backend = FRAMES.build(FRAMES.options(path=str(setup.folder), fps=16.0))
    done, _, _ = filled(setup, dataclasses.replace(table, backend=backend))
    assert [done.index.id(number) for number in range(len(done.index))] == ["clips/good.mov"]
    ((name, reason),) = done.skipped.items()
    assert name == "clips/shot.mov"
    assert reason.endswith("only 7 of 17 frames could be decoded")
