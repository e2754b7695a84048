"""Runs with [data.masks]: the loss is that of each clip's white part, and only that part is learned."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vtrain.contract import Condition, Device, NoiseLevel
from vtrain.data.batches import Batches
from vtrain.data.caching.caches import FilledCaches, fill_caches
from vtrain.data.scanning.scan import scan
from vtrain.plan.records import Plan
from vtrain.run.prepare import planned
from vtrain.train.prefetch import Prefetcher

Run = Callable[..., subprocess.CompletedProcess[str]]

MASKS = '\n[data.masks]\nfolder = "masks"\n'
COLOURS = '\n[[regularizer]]\nuse = "toy-colours"\nblock = 1\nteacher = "cached"\n'


def picture(size: tuple[int, int], white: float) -> np.ndarray:
    """(h, w, 3), white from the left up to that share of the width."""
    found = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    found[:, : round(size[0] * white)] = 255
    return found


def add_image(path: Path, size: tuple[int, int], white: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(size, white)).save(path)


def add_video(path: Path, pictures: list[np.ndarray], fps: int, codec: str = "ffv1") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for each in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def own(folder: Any) -> Any:
    """The folder with clips of its own, so that masks may lie beside them."""
    shared = (folder.path / "clips").resolve()
    (folder.path / "clips").unlink()
    shutil.copytree(shared, folder.path / "clips")
    return folder


def filled_by(config: Path) -> tuple[Plan, FilledCaches]:
    """What a run went by; it has filled the caches."""
    plan = planned(config)
    return plan, fill_caches(plan, list(scan(plan).samples), [], "cpu", lambda *_: None)


def clip_loss(prediction: Tensor, target: Tensor, mask: np.ndarray) -> float:
    """Of one clip (C, f, h, w), in float64 loops over latents. mask: (f, h, w)."""
    error = area = 0.0
    for f, y, x in np.ndindex(*mask.shape):
        if mask[f, y, x]:
            difference = prediction[:, f, y, x].double() - target[:, f, y, x].double()
            error += float(mask[f, y, x]) * float(difference.square().mean())
            area += float(mask[f, y, x])
    return error / area


def columns(width: int, white: float, height: int = 8, frames: int = 3) -> np.ndarray:
    """What latents count under a mask that is white up to that share of the width."""
    row = np.clip(width * white - np.arange(width), 0, 1)
    return np.broadcast_to(row, (frames, height, width))


@pytest.mark.parametrize("invert", [False, True])
def test_the_loss_of_a_run_is_the_mean_over_each_clips_white_part(own, within: Run, invert: bool) -> None:
    """Images, a video that turns white, another size, a clip without a mask: all of it in float64 from what was drawn."""
    masks = own.path / "clips/masks"
    add_image(masks / "clip_0.png", (64, 64), 0.5)
    add_video(masks / "clip_1.mkv", [picture((48, 32), 0.5 if n else 0.0) for n in range(9)], 8)
    add_image(masks / "clip_3.png", (30, 20), 1 / 3)
    add_image(masks / "clip_4.png", (16, 16), 0.25)
    expected = {
        "clip_0": columns(8, 0.5), "clip_1": np.concatenate([0 * columns(12, 0.5, frames=1), columns(12, 0.5, frames=2)]),
        "clip_3": columns(12, 1 / 3), "clip_4": columns(8, 0.25),
    }  # fmt: skip
    config = own.write(MASKS + f"invert = {str(invert).lower()}\n", steps=1, accumulate=4, log_every=1)
    config.write_text(config.read_text().replace('path = "clips"', 'path = "clips"\nrepeats = 1'))
    within("run", config)
    (row,) = own.rows()
    plan, filled = filled_by(config)
    prefetcher = Prefetcher(
        Batches(plan, filled.caches, filled.index), plan.family, plan.sampler, plan.config.run.seed, Device()
    )
    denoiser: Any = plan.family.load_denoiser("cpu", "fp32")
    losses = []
    for micro_batch in range(4):
        fed = prefetcher.prepare(micro_batch, 0)
        given = fed.given
        noisy, target = plan.sampler.corrupt(given.clean, given.noise, given.level)
        with torch.no_grad():
            prediction = denoiser.predict(noisy, given.level, given.condition)
        for number, name in enumerate(fed.sample_ids):
            mask = expected.get(name.removeprefix("clips/").removesuffix(".mp4"))
            whole = np.ones(given.clean.shape[2:])
            counts = whole if mask is None else 1 - mask if invert else mask
            losses.append((name, clip_loss(prediction[number], target[number], counts)))
    assert {name for name, _ in losses} == {f"clips/clip_{number}.mp4" for number in range(5)}
    assert row["loss"] == pytest.approx(sum(loss for _, loss in losses) / 8, rel=1e-5)


LEFT, RIGHT = (200, 40, 40), (30, 60, 220)


def two_colours(frames: int = 9) -> list[np.ndarray]:
    found = np.empty((64, 64, 3), dtype=np.uint8)
    found[:, :32], found[:, 32:] = LEFT, RIGHT
    return [found] * frames


def errors(plan: Plan, filled: FilledCaches, weights: Path | None) -> tuple[float, float]:
    """Mean squared error of the prediction on the left and on the right half, at fixed noise and several levels."""
    denoiser: Any = plan.family.load_denoiser("cpu", "fp32", weights)
    batch = Batches(plan, filled.caches, filled.index)[0]
    clean = batch.latents.mean[:1]
    condition = Condition(batch.text.map(lambda tensor: tensor[:1]))
    left = right = 0.0
    for number, sigma in enumerate((0.3, 0.5, 0.7, 0.9)):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(100 + number))
        level = NoiseLevel(torch.tensor([sigma]), torch.tensor([1000 * sigma]))
        noisy, target = plan.sampler.corrupt(clean, noise, level)
        with torch.no_grad():
            error = (denoiser.predict(noisy, level, condition) - target).square()
        left += error[..., :4].mean().item() / 4
        right += error[..., 4:].mean().item() / 4
    return left, right


def test_only_the_white_half_of_clips_is_learned(own, within: Run) -> None:
    """Left and right are of two colours: what is learned of one half is wrong of the other."""
    for path in (own.path / "clips").glob("clip_*"):
        path.unlink()
    add_video(own.path / "clips/both.mp4", two_colours(), 8, "libx264")
    (own.path / "clips/both.txt").write_text("two colours")
    add_image(own.path / "clips/masks/both.png", (64, 64), 0.5)
    within("run", own.write(MASKS, steps=150, batch_size=1, lr=5e-3, save=150, log_every=50))
    plan, filled = filled_by(own.config)
    before, after = (errors(plan, filled, weights) for weights in (None, own.output / "checkpoints/step-000150"))
    assert after[0] < before[0] / 2
    assert after[1] > before[1]
    shutil.rmtree(own.output)
    shutil.rmtree(own.path / "clips/masks")
    within("run", own.write(steps=150, batch_size=1, lr=5e-3, save=150, log_every=50))
    plain = errors(plan, filled, own.output / "checkpoints/step-000150")
    assert plain[0] < before[0] / 2
    assert plain[1] < before[1] / 2


@pytest.mark.long
def test_two_processes_fill_and_train_with_masks_and_features_as_one_does(
    own, vtrain: Run, within: Run, tmp_path_factory, spoil_end: Callable[[Path], None]
) -> None:
    """A black mask and a clip whose last frames are missing among them: all processes train without these two."""
    for number, white in enumerate((0.5, 0.25, 0.0, 0.75)):
        add_image(own.path / f"clips/masks/clip_{number}.png", (96, 64) if number % 2 else (64, 64), white)
    spoil_end(own.path / "clips/clip_4.mp4")
    settings = {"steps": 4, "batch_size": 1, "log_every": 1, "more": MASKS + COLOURS}

    def written(cache: str, accumulate: int) -> Any:
        placed = replace(own, cache=tmp_path_factory.mktemp(cache))
        config = placed.write(accumulate=accumulate, **settings)
        config.write_text(config.read_text().replace('path = "clips"', 'path = "clips"\nrepeats = 1'))
        return placed

    own = written("two", 2)
    done = vtrain("run", own.config, processes=2)
    assert "its mask masks/clip_2.png is black" in done.stdout + done.stderr
    assert "skipped: clips/clip_4.mp4" in done.stdout
    assert "2 of 5 clips cannot be used; 3 remain" in done.stdout
    assert "features (toy-colours): " in done.stdout
    assert "(the first process's share of 2)" in done.stdout
    assert len(list((own.cache / "features").rglob("*.safetensors"))) == 3
    two = own.rows()
    assert len(two) == 4
    shutil.rmtree(own.output)
    own = written("one", 4)
    within("run", own.config)
    for a, b in zip(two, own.rows(), strict=True):
        assert a["samples"] == b["samples"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["terms"] == pytest.approx(b["terms"], rel=1e-5)
        assert a["terms"]["toy-colours/colours"] > 0
