"""Masks averaged down to latents, against loops in float64 and against what the picture that was drawn must give."""

from __future__ import annotations

import hashlib
import io
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vtrain.contract import ClipShape, Size, SourceRef
from vtrain.data.decoding import masks
from vtrain.data.decoding.masks import EMPTY, emptiness, is_empty, latent_mask, trained
from vtrain.data.decoding.video import FileFault
from vtrain.data.decoding.worker import MaskJob, Workers
from vtrain.data.sample import Box, MaskFile, MaskGrid, Sample
from vtrain_builtin.folder import LocalFolder

SPANS = (range(1), range(1, 5), range(5, 9))
"""Of a codec that keeps the first frame and joins the others by four."""

WHOLE = Size(128, 64)


def sample_of(picture: Size = WHOLE, box: Box | None = None, fps: float = 16, frames: int = 9) -> Sample:
    """A window of a clip of that size; box: the part that is used."""
    return Sample(
        id="clips/a.mp4", dataset="clips", place=0, ref_id="a.mp4", size=1, version="1", picture=picture,
        box=box or Box(0, 0, *picture), shape=ClipShape(frames, 64, 128), fps=fps, starts=(0.0,), crop="center",
        captions=(), mask=MaskFile(SourceRef("masks/a.png", 1, "1")),
    )  # fmt: skip


def png(picture: np.ndarray) -> io.BytesIO:
    target = io.BytesIO()
    Image.fromarray(picture).save(target, "png")
    target.seek(0)
    return target


def video(
    frames: Sequence[np.ndarray],
    fps: float,
    codec: str = "ffv1",
    form: str = "matroska",
    rotate: int = 0,
    crf: int = 12,
) -> bytes:
    """Pictures (h, w, 3) as a video; without loss by default."""
    with tempfile.NamedTemporaryFile() as target:
        with av.open(target.name, "w", format=form) as container:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
            if codec == "libx264":
                stream.options = {"crf": str(crf), "g": "6"}
            if rotate:
                stream.set_display_rotation(rotate)
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        return Path(target.name).read_bytes()


def left_half(size: Size) -> np.ndarray:
    """White, black from the middle on."""
    picture = np.zeros((size.height, size.width, 3), dtype=np.uint8)
    picture[:, : size.width // 2] = 255
    return picture


def noise(count: int, size: Size, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, size.height, size.width, 3), dtype=np.uint8))


def area_mean(picture: np.ndarray, clip: Size, box: Box, size: tuple[int, int]) -> np.ndarray:
    """What each latent counts, in loops over latents and the mask's pixels."""
    height, width = picture.shape[:2]
    found = np.zeros(size)
    for row in range(size[0]):
        top = (box.top + box.height * row / size[0]) * height / clip.height
        bottom = (box.top + box.height * (row + 1) / size[0]) * height / clip.height
        for column in range(size[1]):
            left = (box.left + box.width * column / size[1]) * width / clip.width
            right = (box.left + box.width * (column + 1) / size[1]) * width / clip.width
            total = area = 0.0
            for y in range(math.floor(top), min(height, math.ceil(bottom))):
                for x in range(math.floor(left), min(width, math.ceil(right))):
                    part = (min(bottom, y + 1) - max(top, y)) * (min(right, x + 1) - max(left, x))
                    red, green, blue = map(float, picture[y, x])
                    total += part * (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255
                    area += part
            found[row, column] = total / area
    return found


@pytest.mark.parametrize(
    ("mask", "clip", "box", "size"),
    [
        (WHOLE, WHOLE, Box(0, 0, 128, 64), (8, 16)),
        (WHOLE, WHOLE, Box(17, 3, 83, 55), (8, 16)),
        (Size(64, 32), WHOLE, Box(17, 3, 83, 55), (8, 16)),
        (Size(200, 100), WHOLE, Box(1, 0, 111, 63), (5, 7)),
        (Size(9, 5), Size(1920, 1080), Box(240, 0, 1440, 1080), (6, 10)),
        (Size(3, 2), WHOLE, Box(0, 0, 128, 64), (8, 16)),
    ],
)
def test_a_picture_is_averaged_over_the_area_of_each_latent(mask, clip, box, size) -> None:
    (picture,) = noise(1, mask)
    found = latent_mask(png(picture), sample_of(clip, box), 0.0, SPANS, size)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (3, *size))
    expected = area_mean(picture, clip, box, size)
    assert np.abs(found.numpy() - expected).max() < 1e-6


@pytest.mark.parametrize(("own", "fps", "start"), [(16, 16, 0.0), (12, 16, 0.0), (30, 16, 0.25), (24, 10, 0.1)])
def test_a_video_is_averaged_over_the_frames_for_which_each_latent_stands(own, fps, start) -> None:
    """The frame on screen at each of the window's times, by its own timestamps."""
    size, box = Size(32, 16), Box(5, 1, 96, 60)
    pictures = noise(40, size)
    sample = sample_of(box=box, fps=fps)
    found = latent_mask(io.BytesIO(video(pictures, own)), sample, start, SPANS, (4, 6))
    means = [area_mean(picture, WHOLE, box, (4, 6)) for picture in pictures]
    stamps = [round(1000 * k / own) / 1000 for k in range(40)]  # as Matroska has them
    shown = [max(k for k in range(40) if stamps[k] - 0.00125 <= start + n / fps) for n in range(9)]
    for latent, span in enumerate(SPANS):
        expected = sum(means[shown[frame]] for frame in span) / len(span)
        assert np.abs(found[latent].numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("rate", [8, 16, 24])
@pytest.mark.parametrize("size", [Size(128, 64), Size(64, 32), Size(320, 160)])
@pytest.mark.parametrize(
    ("box", "whites"), [(Box(0, 0, 128, 64), 8.0), (Box(32, 0, 96, 64), 16 / 3), (Box(0, 8, 72, 48), 128 / 9)]
)
def test_the_left_half_of_a_mask_is_the_left_half_of_the_latents(rate, size, box, whites) -> None:
    """H.264 as people have it. whites: columns of latents, of 16, that lie left of the middle of the clip's picture."""
    stream = io.BytesIO(video([left_half(size)] * rate, rate, "libx264", "mp4"))
    found = latent_mask(stream, sample_of(box=box), 0.0, SPANS, (8, 16))
    expected = np.clip(whites - np.arange(16), 0, 1)
    assert np.abs(found.numpy() - expected).max() < 0.05
    assert np.abs(found.numpy() - expected).mean() < 0.005


def test_what_turns_white_in_time_counts_from_that_latent_on() -> None:
    black, white = (np.full((16, 32, 3), value, dtype=np.uint8) for value in (0, 255))
    found = latent_mask(io.BytesIO(video([black] * 3 + [white] * 9, 16)), sample_of(), 0.0, SPANS, (2, 4))
    assert found.flatten(1).tolist() == [[0.0] * 8, [0.5] * 8, [1.0] * 8]


def test_white_is_exactly_one_and_black_exactly_zero() -> None:
    white = latent_mask(png(np.full((50, 100), 255, dtype=np.uint8)), sample_of(), 0.0, SPANS, (7, 13))
    black = latent_mask(png(np.zeros((50, 100), dtype=np.uint8)), sample_of(), 0.0, SPANS, (7, 13))
    assert white.min() == white.max() == 1
    assert black.min() == black.max() == 0
    assert torch.equal(trained(white, invert=True), black)
    assert torch.equal(trained(black, invert=True), white)
    assert torch.equal(trained(white, invert=False), white)


def test_a_video_in_limited_range_has_a_white_of_one() -> None:
    """Stored as 235 of 255, as H.264 does."""
    stream = io.BytesIO(video([np.full((32, 64, 3), 255, dtype=np.uint8)] * 9, 16, "libx264", "mp4"))
    assert latent_mask(stream, sample_of(), 0.0, SPANS, (4, 8)).min() > 0.99


def test_a_late_window_has_the_frames_of_its_own_times() -> None:
    pictures = noise(64, Size(32, 16), seed=3)
    data, sample = video(pictures, 16), sample_of()
    found = latent_mask(io.BytesIO(data), sample, 3.0, SPANS, (4, 8))
    means = [area_mean(pictures[48 + n], WHOLE, sample.box, (4, 8)) for n in range(9)]
    assert np.abs(found[2].numpy() - sum(means[5:]) / 4).max() < 1e-6


def test_a_window_that_is_sought_is_the_same_as_one_that_is_decoded_from_the_start(monkeypatch) -> None:
    """H.264 with B-frames and few key frames."""
    data = video(noise(70, Size(64, 32), seed=4), 16, "libx264", "mp4")
    found = latent_mask(io.BytesIO(data), sample_of(), 3.125, SPANS, (4, 8))
    monkeypatch.setattr(masks, "SEEK_SECONDS", math.inf)
    assert torch.equal(found, latent_mask(io.BytesIO(data), sample_of(), 3.125, SPANS, (4, 8)))


def test_a_mask_that_cannot_be_sought_is_decoded_from_its_start(monkeypatch) -> None:
    data = video(noise(70, Size(64, 32), seed=4), 16, "libx264", "mp4")
    expected = latent_mask(io.BytesIO(data), sample_of(), 3.125, SPANS, (4, 8))
    real = masks.stamped_from

    def unseekable(container, stream, seek):
        if seek is not None:
            raise FileFault("cannot be decoded: Operation not permitted")
        yield from real(container, stream, seek)

    monkeypatch.setattr(masks, "stamped_from", unseekable)
    assert torch.equal(latent_mask(io.BytesIO(data), sample_of(), 3.125, SPANS, (4, 8)), expected)


def test_a_mask_that_is_to_be_shown_turned_is_turned() -> None:
    """Stored upright as 64x128, white above; turned by a quarter to the left, white on the left."""
    stored = np.zeros((128, 64, 3), dtype=np.uint8)
    stored[:64] = 255
    stream = io.BytesIO(video([stored] * 9, 16, "libx264", "mp4", rotate=90))
    found = latent_mask(stream, sample_of(), 0.0, SPANS, (8, 16))
    assert found[:, :, :7].min() > 0.98
    assert found[:, :, 9:].max() < 0.02


def test_a_mask_that_ends_before_the_window_is_refused_with_both_counts() -> None:
    data = video(noise(6, Size(32, 16)), 16)
    with pytest.raises(FileFault, match=r"has frames for 7 of the window's 9: it ends before 0\.438 s"):
        latent_mask(io.BytesIO(data), sample_of(), 0.0, SPANS, (4, 8))


def test_the_last_frame_is_held_for_one_frame_more() -> None:
    """Lengths of files are not exact; a scan lets a mask be as much shorter."""
    pictures = noise(8, Size(32, 16))
    found = latent_mask(io.BytesIO(video(pictures, 16)), sample_of(), 0.0, SPANS, (4, 8))
    means = [area_mean(pictures[min(n, 7)], WHOLE, Box(0, 0, *WHOLE), (4, 8)) for n in range(9)]
    assert np.abs(found[2].numpy() - sum(means[5:]) / 4).max() < 1e-6


def jpegs(sizes: Sequence[Size]) -> bytes:
    """A motion JPEG whose pictures have these sizes."""
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuvj420p"
        for number, size in enumerate(sizes):
            picture = io.BytesIO()
            Image.fromarray(left_half(size)).save(picture, "jpeg")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.time_base = stream, Fraction(1, 16)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    return target.getvalue()


def test_a_mask_that_changes_its_size_is_refused() -> None:
    data = jpegs([Size(64, 32)] * 4 + [Size(32, 32)] * 6)
    with pytest.raises(FileFault, match="its picture size changes from 64x32 to 32x32"):
        latent_mask(io.BytesIO(data), sample_of(), 0.0, SPANS, (4, 8))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: b"not a mask" * 100, "cannot be read as a video"),
        (lambda data: data[: len(data) // 2], "cannot be decoded|damaged|has frames for|cannot be read"),
    ],
)
def test_a_mask_that_cannot_be_read_is_refused(spoil: Callable[[bytes], bytes], reason: str) -> None:
    data = video(noise(9, Size(64, 32)), 16, "libx264", "mp4")
    with pytest.raises(FileFault, match=reason):
        latent_mask(io.BytesIO(spoil(data)), sample_of(), 0.0, SPANS, (4, 8))


def test_a_mask_is_empty_if_no_latent_counts_for_more_than_compression_makes_of_black() -> None:
    black, spot = torch.full((3, 4, 8), EMPTY), torch.zeros(3, 4, 8)
    spot[1, 2, 3] = 2 * EMPTY
    assert is_empty(black, invert=False)
    assert not is_empty(black, invert=True)
    assert not is_empty(spot, invert=False)
    assert is_empty(torch.ones(3, 4, 8), invert=True)
    assert not is_empty(torch.ones(3, 4, 8), invert=False)
    assert is_empty(latent_mask(png(np.zeros((8, 16), dtype=np.uint8)), sample_of(), 0.0, SPANS, (4, 8)), invert=False)


def test_h264_black_is_empty() -> None:
    stream = io.BytesIO(video([np.zeros((32, 64, 3), dtype=np.uint8)] * 9, 16, "libx264", "mp4"))
    assert is_empty(latent_mask(stream, sample_of(), 0.0, SPANS, (4, 8)), invert=False)


def test_what_lossy_compression_makes_of_black_hardly_counts_beside_a_disc_of_a_hundredth() -> None:
    """A moving disc in H.264 at crf 35; docs/masks.md tells the figure."""
    y, x = np.mgrid[:256, :456]
    discs = [np.hypot(x - 100 - 20 * number, y - 128) < 20 for number in range(12)]
    pictures = [np.repeat((255 * disc).astype(np.uint8)[..., None], 3, axis=2) for disc in discs]
    sample = sample_of(Size(456, 256))
    exact, lossy = (
        latent_mask(io.BytesIO(data), sample, 0.0, SPANS, (32, 56))
        for data in (video(pictures, 16), video(pictures, 16, "libx264", "mp4", crf=35))
    )
    assert 0.009 < exact.mean() < 0.012
    outside = lossy[exact == 0]
    assert outside.sum() / lossy.sum() < 0.005
    assert outside.max() < EMPTY


def test_why_an_empty_mask_is_left_out_names_it_and_says_what_to_do() -> None:
    assert emptiness("masks/a.png", invert=False) == (
        "its mask masks/a.png is black where the clip is used, so nothing of it would be trained: fix or remove the mask, "
        "or set invert = true in [data.masks] if it is the other way round"
    )
    assert "masks/a.png is white" in emptiness("masks/a.png", invert=True)
    assert "remove invert in [data.masks]" in emptiness("masks/a.png", invert=True)


GRID = MaskGrid(SPANS, 4, 8)


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    (tmp_path / "masks").mkdir()
    return LocalFolder(str(tmp_path))


def masked_by(folder: LocalFolder, name: str, data: bytes) -> Sample:
    """A sample with this mask file in the folder."""
    (Path(folder.location) / name).write_bytes(data)
    (ref,) = (ref for ref in folder.refs() if ref.id == name)
    return replace(sample_of(), mask=MaskFile(ref))


def test_a_decoding_process_gives_the_same_mask_and_the_hash_of_its_file(folder, decoding_process: Workers) -> None:
    data = video(noise(9, Size(64, 32)), 16)
    sample = masked_by(folder, "masks/a.mkv", data)
    content, mask = decoding_process.mask(folder, sample, 0.0, GRID)
    assert content == hashlib.sha256(data).hexdigest()
    assert torch.equal(mask, latent_mask(io.BytesIO(data), sample, 0.0, SPANS, (4, 8)))


def test_masks_come_in_order_are_left_where_unwanted_and_faults_name_the_file(
    folder, decoding_process: Workers
) -> None:
    good = masked_by(folder, "masks/a.png", png(left_half(WHOLE)).getvalue())
    bad = masked_by(folder, "masks/b.mp4", b"nothing that shows")
    jobs = [
        MaskJob(folder, good, 0.0, GRID),
        MaskJob(folder, bad, 0.0, GRID),
        MaskJob(folder, good, 0.0, GRID, wanted=lambda content: False),
    ]
    first, second, third = (done for _, done in decoding_process.masked(jobs))
    assert first.fault is None
    assert first.pixels is not None
    assert first.pixels[:, :, :4].min() == 1
    assert first.pixels[:, :, 4:].max() == 0
    assert second.fault is not None
    assert second.fault.reason.startswith("its mask masks/b.mp4: cannot be read as a video")
    assert second.fault.lasting
    assert (third.pixels, third.fault, third.content) == (None, None, first.content)


def test_a_mask_that_is_gone_is_a_fault_that_may_pass(folder, decoding_process: Workers) -> None:
    sample = masked_by(folder, "masks/a.png", png(left_half(WHOLE)).getvalue())
    (Path(folder.location) / "masks/a.png").unlink()
    with pytest.raises(FileFault, match=r"its mask masks/a\.png: cannot be opened") as raised:
        decoding_process.mask(folder, sample, 0.0, GRID)
    assert not raised.value.lasting
