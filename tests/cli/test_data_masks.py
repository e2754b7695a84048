"""`vtrain data show` of clips with masks: which mask, what trains of it, and exactly that on the contact sheet."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vtrain.cli.data_facts import preview
from vtrain.contract import DataError

CONFIG = """
[run]
output_dir = "out"
[model]
use = "toy"
train = "full"
[precision]
mixed = "no"
[train]
steps = 1
[optimizer]
use = "adamw"
lr = 1e-3
[[data]]
use = "folder"
id = "clips"
path = "clips"
resolution = ["96x64"]
captions = "filename"
[data.video]
frames = 9
fps = 8
[data.masks]
folder = "masks"
"""


def clip(path: Path, frames: int = 9, grey: int | None = None) -> None:
    """96x64 of noise, or all of one grey, without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for number in range(frames):
            noise = np.random.default_rng(number).integers(0, 256, (64, 96, 3), dtype=np.uint8)
            picture = noise if grey is None else np.full_like(noise, grey if number else 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def left_half(path: Path, size: tuple[int, int] = (48, 32)) -> None:
    picture = np.zeros(size[::-1], dtype=np.uint8)
    picture[:, : size[0] // 2] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of three clips: a with an image, b with a video (black in its first frame, then white), c without a mask."""
    for name in "abc":
        clip(tmp_path / "clips" / f"{name}.mkv")
    left_half(tmp_path / "clips/masks/a.png")
    clip(tmp_path / "clips/masks/b.mkv", grey=255)
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path / "config.toml"


def test_a_mask_is_shown_with_its_file_its_kind_and_what_trains(config: Path, vtrain) -> None:
    text = vtrain("data", "show", config, "a.mkv").stdout
    assert "  mask    masks/a.png: image, 48x32; white trains\n" in text
    assert ", 50.0% of it trains\n" in text
    text = vtrain("data", "show", config, "b.mkv").stdout
    assert "  mask    masks/b.mkv: video, 96x64, 9 frames; white trains\n" in text
    assert ", 66.7% of it trains\n" in text
    assert "  mask    none: all of the picture trains\n" in vtrain("data", "show", config, "c.mkv", "--no-sheet").stdout


def test_inverted_black_trains(config: Path, vtrain) -> None:
    config.write_text(CONFIG + "invert = true\n")
    assert (
        "  mask    masks/a.png: image, 48x32; black trains (invert)\n" in vtrain("data", "show", config, "a.mkv").stdout
    )
    assert ", 33.3% of it trains\n" in vtrain("data", "show", config, "b.mkv").stdout


def test_programs_get_the_same(config: Path, shown) -> None:
    found = shown(config, "b.mkv", "--sheet", config.parent / "b.png")
    assert found["mask"] == {
        "file": "masks/b.mkv", "kind": "video", "size": "96x64", "frames": 9, "inverted": False, "sha256": "",
    }  # fmt: skip
    (window,) = found["video"]
    assert window["mask"]["area"] == pytest.approx(2 / 3)
    assert (window["mask"]["state"], window["mask"]["fault"]) == ("missing", "")
    found = shown(config, "c.mkv", "--no-sheet")
    assert (found["mask"], found["video"][0]["mask"]) == (None, None)


def test_without_a_sheet_what_trains_is_known_from_the_cache(config: Path, vtrain, shown) -> None:
    (window,) = shown(config, "a.mkv", "--no-sheet")["video"]
    assert window["mask"]["area"] is None
    assert window["mask"]["state"] == "unknown: the file was not read yet"
    vtrain("cache", "fill", config)
    found = shown(config, "a.mkv", "--no-sheet")
    assert len(found["mask"]["sha256"]) == 64
    (window,) = found["video"]
    assert (window["mask"]["area"], window["mask"]["state"]) == (0.5, "sound")
    fresh = shown(config, "a.mkv", "--sheet", config.parent / "a.png")["video"][0]
    assert fresh["mask"] == window["mask"]


def test_the_sheet_shows_what_does_not_train_dimmed(config: Path, vtrain) -> None:
    sheet = config.parent / "a.png"
    vtrain("data", "show", config, "a.mkv", "--sheet", sheet)
    picture = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    # Pictures of noise have hardly a white pixel; lines of words are mostly white.
    busy = (picture[:, :96] != 255).any(2).mean(1) > 0.9
    tops = [row for row in range(1, len(busy)) if busy[row] and not busy[row - 1]]
    clip, masked = (picture[top : top + 64, :96] for top in tops)
    assert np.array_equal(masked[:, :48], clip[:, :48])
    expected = np.rint(0.35 * clip[:, 48:] + 0.65 * np.array([150, 0, 60]))
    assert np.abs(masked[:, 48:] - expected).max() <= 1


def test_the_preview_is_the_mask_at_the_latents_each_a_rectangle_of_its_own_frames() -> None:
    frames = np.full((5, 10, 12, 3), 200, dtype=np.uint8)
    mask = torch.tensor([[[1.0, 0.0, 0.5]], [[0.0, 1.0, 1.0]]])
    found = preview(frames, mask, (range(1), range(1, 5)))
    dark = np.rint(0.35 * 200 + 0.65 * np.array([150, 0, 60]))
    half = np.rint((200 + 0.35 * 200 + 0.65 * np.array([150, 0, 60])) / 2)
    assert (found[0, :, :4] == 200).all()
    assert (found[0, :, 4:8] == dark).all()
    assert (np.abs(found[0, :, 8:] - half) <= 1).all()
    assert (found[1:, :, :4] == dark).all()
    assert (found[1:, :, 4:] == 200).all()


def test_a_mask_that_cannot_be_decoded_is_an_error_that_names_it(config: Path, vtrain) -> None:
    """Its header is whole, as a scan looks at it; its later frames are not."""
    (config.parent / "clips/masks/b.mkv").unlink()
    path = config.parent / "clips/masks/b.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for number in range(9):
            noise = np.random.default_rng(number).integers(0, 256, (64, 96, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) * 3 // 4] = bytes(len(data) * 3 // 4 - len(data) // 2)
    path.write_bytes(data)
    done = vtrain("data", "show", config, "b.mkv", error=DataError)
    assert str(done.exception).startswith("clips/b.mkv: its mask masks/b.mp4: ")
    assert "contact sheet: " in done.stdout
