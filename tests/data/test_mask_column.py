"""Masks in the caches: made once, inverted when read, the windows that they leave nothing of, and what a batch has of them."""

from __future__ import annotations

import pickle
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vtrain.contract import DataError
from vtrain.data.batches import Batches
from vtrain.data.caching.caches import fill_caches
from vtrain.data.caching.inventory import Stores, wanted
from vtrain.data.scanning.scan import scan
from vtrain.plan.records import MasksPlan


@pytest.fixture
def three(setup, make_video):
    for k in range(3):
        setup.add(f"{k}.mp4", make_video(frames=27 + k, fps=24), f"caption number {k}")
    return setup


def draw(setup, name: str, picture: np.ndarray) -> None:
    """A mask, of the clip's size or another."""
    file = setup.folder / "masks" / f"{name}.png"
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(picture).save(file)


def half(left: int, right: int, height: int = 64, width: int = 128) -> np.ndarray:
    picture = np.full((height, width), left, dtype=np.uint8)
    picture[:, width // 2 :] = right
    return picture


def masked(setup, *, invert: bool = False, **table):
    return replace(setup.dataset(**table), masks=MasksPlan("masks", invert))


def fill(setup, *datasets, report=lambda _: None, **train):
    plan = setup.plan(*datasets, **train)
    return plan, fill_caches(plan, scan(plan).samples, (), "cpu", report)


def batches(setup, *datasets, **train) -> dict[str, torch.Tensor | None]:
    """Of batches of one clip: clip -> its mask."""
    plan, filled = fill(setup, *datasets, **train)
    made = Batches(plan, filled.caches, filled.index)
    found = (made[number] for number in range(len(filled.index)))
    return {batch.sample_ids[0].removeprefix("clips/"): batch.mask for batch in found}


def skipped(setup, dataset) -> dict[str, str]:
    return {example: why for why, (_, example) in scan(setup.plan(dataset)).survey.datasets[0].skipped.items()}


def test_a_batch_has_the_masks_of_its_clips_at_the_latents_grid(three) -> None:
    draw(three, "0", half(255, 0))
    draw(three, "1", half(0, 255, 32, 64))
    left = torch.zeros(5, 8, 16)
    left[:, :, :8] = 1
    found = batches(three, masked(three))
    assert torch.equal(found["0.mp4"], left[None])
    assert torch.equal(found["1.mp4"], 1 - left[None])
    assert found["2.mp4"] is None
    inverted = batches(three, masked(three, invert=True))
    assert torch.equal(inverted["0.mp4"], 1 - left[None])
    assert inverted["2.mp4"] is None, "a clip without a mask is trained on whole either way"


def test_a_clip_without_a_mask_is_ones_beside_one_with(three) -> None:
    draw(three, "0", half(255, 0))
    plan, filled = fill(three, masked(three), batch_size=3)
    batch = Batches(plan, filled.caches, filled.index)[0]
    areas = dict(zip(batch.sample_ids, batch.mask.mean((1, 2, 3)).tolist(), strict=True))
    assert areas == {"clips/0.mp4": 0.5, "clips/1.mp4": 1.0, "clips/2.mp4": 1.0}
    assert batch.mask.dtype == torch.float32


def test_inverting_makes_nothing_again_and_a_changed_mask_is_made_alone(three) -> None:
    draw(three, "0", half(255, 0))
    draw(three, "1", half(200, 100))
    fill(three, masked(three))
    entries = {path: path.stat().st_mtime_ns for path in three.cache.rglob("*.safetensors")}
    fill(three, masked(three, invert=True))
    assert {path: path.stat().st_mtime_ns for path in three.cache.rglob("*.safetensors")} == entries
    draw(three, "1", half(0, 255))
    clips, told = three.family.clips, []
    fill(three, masked(three), report=lambda now: told.append((now.stage, now.done, now.total)))
    assert three.family.clips == clips
    assert [each for each in told if each[0] == "mask"] == [("mask", 1, 2), ("mask", 2, 2)]


def test_a_mask_that_leaves_nothing_drops_its_clip_before_it_is_encoded_and_that_is_remembered(three) -> None:
    draw(three, "0", half(0, 0))
    draw(three, "1", half(255, 0))
    _, filled = fill(three, masked(three))
    ((name, why),) = filled.skipped.items()
    assert name == "clips/0.mp4"
    assert why.startswith("its mask masks/0.png is black where the clip is used, so nothing of it would be trained")
    assert three.family.clips == 2
    assert skipped(three, masked(three)) == {"0.mp4": why}
    again, refilled = fill(three, masked(three))
    assert refilled.skipped == {}
    assert len(refilled.index) == 2
    stores = Stores(again)
    names = wanted(stores, scan(again).samples, ())
    assert {kind: (len(each.keys), each.unread) for kind, each in names.items()} == {
        "text": (3, 0), "video": (2, 0), "features": (0, 0), "mask": (1, 0), "condition": (0, 0),
    }  # fmt: skip


def test_what_is_empty_depends_on_inverting_and_needs_no_mask_to_be_made_again(three) -> None:
    draw(three, "0", half(0, 0))
    draw(three, "1", half(255, 255))
    fill(three, masked(three))
    assert list(skipped(three, masked(three))) == ["0.mp4"]
    told = []
    _, filled = fill(
        three, masked(three, invert=True), report=lambda now: told.append((now.stage, now.done, now.total))
    )
    assert list(filled.skipped) == ["clips/1.mp4"]
    assert "white" in filled.skipped["clips/1.mp4"]
    assert [each for each in told if each[0] == "mask"] == [("mask", 2, 2)]
    assert list(skipped(three, masked(three, invert=True))) == ["1.mp4"]
    draw(three, "0", half(0, 255))  # mended
    _, filled = fill(three, masked(three))
    assert filled.skipped == {}
    assert skipped(three, masked(three)) == {}


def test_a_new_caption_does_not_bring_a_clip_with_an_empty_mask_back(three) -> None:
    draw(three, "0", half(0, 0))
    fill(three, masked(three))
    (three.folder / "0.txt").write_text("new words")
    _, filled = fill(three, masked(three))
    assert len(filled.index) == 2
    assert list(skipped(three, masked(three))) == ["0.mp4"]


def test_only_the_windows_that_a_mask_leaves_empty_are_left_out(three, tmp_path) -> None:
    """A video mask that is white for its first half alone: of four windows the last ones train nothing."""
    target = three.folder / "masks" / "long.mkv"
    target.parent.mkdir()
    three.add("long.mp4", clip_of(tmp_path, 96), "a long clip")
    with av.open(str(target), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "bgr0"
        for k in range(96):
            grey = np.full((64, 128, 3), 255 if k < 30 else 0, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    dataset = masked(three, video={"window": "random", "windows": 4})
    _, filled = fill(three, dataset)
    out = [name for name in filled.skipped if name.startswith("clips/long.mp4, the window at ")]
    assert list(filled.skipped) == out
    assert 1 <= len(out) < 4
    number = next(n for n in range(len(filled.index)) if filled.index.id(n) == "clips/long.mp4")
    assert len(filled.index.video.keys(number)) == len(filled.index.masks.keys(number)) == 4 - len(out)
    assert skipped(three, dataset) == {}
    pieces = masked(three, video={"window": "all"})
    _, filled = fill(three, pieces)
    assert any(name.startswith("clips/long.mp4#") for name in filled.skipped)
    assert any(filled.index.id(n).startswith("clips/long.mp4#1") for n in range(len(filled.index)))


def clip_of(folder, frames: int) -> bytes:
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for k in range(frames):
            grey = np.full((64, 128, 3), k, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return (folder / "clip.mp4").read_bytes()


def test_a_mask_that_cannot_be_decoded_leaves_its_clip_out_with_its_name(three, make_video) -> None:
    draw(three, "0", half(255, 0))
    data = (three.folder / "masks/0.png").read_bytes()
    plan = three.plan(masked(three))
    samples = list(scan(plan).samples)
    (three.folder / "masks/0.png").write_bytes(data[:-60] + bytes(60))
    filled = fill_caches(plan, samples, (), "cpu", lambda *_: None)
    ((name, why),) = filled.skipped.items()
    assert name == "clips/0.mp4"
    assert why.startswith("its mask masks/0.png")
    assert len(filled.index) == 2


def test_only_empty_masks_are_an_error_with_the_reasons(setup, make_video) -> None:
    setup.add("a.mp4", make_video())
    draw(setup, "a", half(0, 0))
    with pytest.raises(DataError, match="is black where the clip is used"):
        fill(setup, masked(setup))


def test_an_index_without_masks_and_features_is_as_small_as_before(setup, make_video) -> None:
    for k in range(4):
        setup.add(f"{k}.mp4", make_video(frames=27 + k))
    _, filled = fill(setup)
    index = filled.index
    assert (index.masks, dict(index.features), index.sources) == (None, {}, None)
    whole = pickle.dumps(index)
    bare = sum(len(rows.data) + rows.ends.nbytes for rows in (index.names, index.video, index.text))
    bare += index.datasets.nbytes + index.buckets.nbytes
    assert len(whole) < bare + 2000
