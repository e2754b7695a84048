"""Single images as clips of one frame, against PIL, which reads them without ffmpeg."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from vtrain.contract import Caption, ClipShape, Size
from vtrain.data.decoding.decode import decode
from vtrain.data.decoding.probe import probe
from vtrain.data.decoding.video import FileFault
from vtrain.data.sample import Box, Sample

SIZE = (127, 65)


def scene() -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 255, SIZE[0]), np.linspace(0, 255, SIZE[1]))
    return np.stack([x, y, (x + y) / 2], -1).astype(np.uint8)


def saved(form: str, mode: str = "RGB", **options: object) -> bytes:
    image = Image.fromarray(scene())
    if mode == "RGBA":
        image.putalpha(Image.fromarray(scene()[..., 0]))
    image = image.convert(mode) if mode != "RGBA" else image
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """(h, w, 3) as the cache would get it."""
    found = probe(io.BytesIO(data))
    assert (found.frames, found.duration) == (1, 0.04)
    sample = Sample(
        id="clips/x", dataset="clips", place=0, ref_id="x", size=1, version="1",
        picture=Size(found.width, found.height), box=Box(0, 0, found.width, found.height),
        shape=ClipShape(1, found.height, found.width), fps=16.0, starts=(0.0,), crop="center", captions=(Caption(""),),
    )  # fmt: skip
    return decode(io.BytesIO(data), sample, 0.0)[:, 0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "L", {}), ("PNG", "P", {}), ("BMP", "RGB", {}), ("BMP", "P", {}),
     ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "L", {}),
     ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGBA", {"lossless": True})],
)  # fmt: skip
def test_a_lossless_image_is_read_exactly_without_its_transparency(form, mode, options) -> None:
    data = saved(form, mode, **options)
    assert np.array_equal(decoded(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "subsampling": 0}), ("JPEG", {"progressive": True}),
     ("WEBP", {"quality": 95})],
)  # fmt: skip
def test_a_lossy_image_differs_by_the_upsampling_of_colour_alone(form, options) -> None:
    """libjpeg and libwebp against ffmpeg: at most 6 of 255 apart, 1 on average."""
    data = saved(form, **options)
    error = np.abs(decoded(data).astype(int) - np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    assert error.max() <= 6
    assert error.mean() <= 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photo_is_turned_and_mirrored_as_its_exif_says(form) -> None:
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(form, exif=exif, **options)
        upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        found = decoded(data)
        assert found.shape == upright.shape, orientation
        assert np.abs(found.astype(int) - upright).max() <= 2, orientation


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_half_an_image_is_refused(form) -> None:
    """ffmpeg by itself gives half a JPEG, the rest grey."""
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(noise).save(target, form)
    with pytest.raises(FileFault, match=r"first frame cannot be decoded|cannot be read as a video|not one frame"):
        probe(io.BytesIO(target.getvalue()[: len(target.getvalue()) // 2]))


def test_jpeg_in_tiff_is_refused_and_not_shown_black() -> None:
    with pytest.raises(FileFault, match=r"^is a TIFF file with JPEG compression; save it with another$"):
        probe(io.BytesIO(saved("TIFF", compression="jpeg")))


def test_an_animated_png_is_a_clip_of_its_frames() -> None:
    images = [Image.fromarray(np.roll(scene(), 5 * k, 1)) for k in range(5)]
    target = io.BytesIO()
    images[0].save(target, "PNG", save_all=True, append_images=images[1:], duration=40)
    found = probe(io.BytesIO(target.getvalue()))
    assert (found.codec, found.frames, found.duration) == ("apng", 5, pytest.approx(0.2))


def test_an_animated_picture_that_is_not_read_is_called_so_and_not_shown_as_one_frame() -> None:
    frames = [Image.fromarray(scene() // (k + 1)) for k in range(3)]
    target = io.BytesIO()
    frames[0].save(target, "WEBP", save_all=True, append_images=frames[1:], duration=100)
    avif = b"\0\0\0\x20ftypavis\0\0\0\0avifavis" + bytes(100)
    for data, name in ((target.getvalue(), "WebP"), (avif, "AVIF")):
        with pytest.raises(FileFault, match=rf"^is an animated {name}, which is not read: save it as MP4 or GIF$"):
            probe(io.BytesIO(data))


@pytest.mark.parametrize("form", ["GIF", "PNG"])
def test_an_animated_gif_or_png_has_its_frames(form) -> None:
    frames = [Image.fromarray(scene() // (k + 1)) for k in range(3)]
    target = io.BytesIO()
    frames[0].save(target, form, save_all=True, append_images=frames[1:], duration=100)
    found = probe(io.BytesIO(target.getvalue()))
    assert (found.frames, found.duration) == (3, pytest.approx(0.3))
