"""Codecs, colours and containers as people have them: decoded pixels against ffmpeg told outright what the file holds.

The reference is ffmpeg's own filter graph with matrix and range given by hand, and, for 4:4:4, the formula of H.273 in
float64. Our path has to find matrix and range in the file.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vtrain.contract import Caption, ClipShape, Size
from vtrain.data.decoding.decode import decode
from vtrain.data.decoding.probe import Probe, probe
from vtrain.data.decoding.video import FileFault
from vtrain.data.sample import Box, Sample

BT709, UNSTATED, BT470BG, SMPTE170M, BT2020 = 1, 2, 5, 6, 9
LIMITED, FULL = 1, 2
QUIET = {
    "libx265": {"x265-params": "log-level=none:crf=8"},
    "libx264": {"crf": "8"},
    "libvpx-vp9": {"crf": "10"},
}


def scene(k: int, size: tuple[int, int]) -> np.ndarray:
    """Frame k: smooth ramps of strong colours that move, (h, w, 3)."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    red, green, blue = x, y, (1 - x) * (1 - y) + 0.1 * np.sin(0.7 * k)
    return (np.stack([red, green, blue], -1).clip(0, 1) * 255).astype(np.uint8)


def encoded(codec: str, form: str, *arguments: object, **named: object) -> bytes:
    """`once`, and again where x265 made a header that no muxer takes: one time in 60, in PyAV 18.1's build."""
    for _ in range(9):
        try:
            return once(codec, form, *arguments, **named)
        except av.FFmpegError:
            if codec != "libx265":
                raise
    return once(codec, form, *arguments, **named)


def once(
    codec: str,
    form: str,
    pix_fmt: str = "yuv420p",
    matrix: int = UNSTATED,
    span: int = 0,
    size: tuple[int, int] = (128, 64),
    frames: int = 6,
    sound: bool = False,
    aspect: Fraction | None = None,
    rotate: int = 0,
    options: Mapping[str, str] | None = None,
) -> bytes:
    """A file of `frames` scenes at 12 a second, whose tags say matrix and span (range), made with them too."""
    os.environ.setdefault("SVT_LOG", "1")
    with tempfile.NamedTemporaryFile() as target:
        container = av.open(target.name, "w", format=form)
        if sound:
            audio = container.add_stream("aac" if form in ("mp4", "mov") else "libopus", rate=48000)
        stream = container.add_stream(codec, rate=12)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.options = {**QUIET.get(codec, {}), **(options or {})}
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = span
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotate:
            stream.set_display_rotation(rotate)
        if sound:
            for k in range(24):
                tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
                tone.rate, tone.pts = 48000, k * 1024
                container.mux(audio.encode(tone))
            container.mux(audio.encode())
        for k in range(frames):
            picture = av.VideoFrame.from_ndarray(scene(k, size), format="rgb24")
            target_matrix = {UNSTATED: BT470BG}.get(matrix, matrix)
            frame = picture.reformat(format=pix_fmt, dst_colorspace=target_matrix, dst_color_range=span or LIMITED)
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.close()
        return Path(target.name).read_bytes()


def whole(found: Probe, frames: int, start: float = 0.0) -> Sample:
    """All of the picture at its own size, `frames` of them at 12 a second."""
    return Sample(
        id="clips/x", dataset="clips", place=0, ref_id="x", size=1, version="1",
        picture=Size(found.width, found.height), box=Box(0, 0, found.width, found.height),
        shape=ClipShape(frames, found.height, found.width), fps=12.0, starts=(start,), crop="center",
        captions=(Caption(""),),
    )  # fmt: skip


def decoded(data: bytes, frames: int = 6, start: float = 0.0) -> np.ndarray:
    """(F, h, w, 3) as the cache would get them."""
    sample = whole(probe(io.BytesIO(data)), frames, start)
    return decode(io.BytesIO(data), sample, start).permute(1, 2, 3, 0).numpy()


def reference(data: bytes, scale: str = "", *more: tuple[str, str]) -> np.ndarray:
    """All frames (F, h, w, 3) by ffmpeg's scale filter with these options."""
    pictures = []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        chain = [graph.add_buffer(template=stream, time_base=stream.time_base)]
        filters = [("scale", f"{scale}:flags=bicubic".lstrip(":")), ("format", "rgb24"), *more]
        chain += [graph.add(name, arguments) for name, arguments in filters] + [graph.add("buffersink")]
        graph.link_nodes(*chain).configure()
        for frame in [*container.decode(stream), None]:
            graph.vpush(frame)
            while True:
                try:
                    pictures.append(graph.vpull().to_ndarray())
                except (BlockingIOError, EOFError):
                    break
    return np.stack(pictures)


def test_codecs_give_ffmpegs_pixels_exactly() -> None:
    """8 and 10 bit, every codec in a container that people use for it; each file decoded by ours and by ffmpeg's filters."""
    for codec, form, pix_fmt in [
        ("libx264", "mp4", "yuv420p"), ("libx264", "matroska", "yuv420p10le"), ("libx264", "mov", "yuv422p"),
        ("libx264", "mpegts", "yuv420p"), ("libx264", "flv", "yuv420p"), ("libx265", "mp4", "yuv420p"),
        ("libx265", "matroska", "yuv420p10le"), ("libsvtav1", "mp4", "yuv420p"), ("libsvtav1", "webm", "yuv420p10le"),
        ("libvpx-vp9", "webm", "yuv420p"), ("libvpx-vp9", "mp4", "yuv444p"), ("mpeg4", "avi", "yuv420p"),
        ("mpeg4", "mp4", "yuv420p"), ("mpeg2video", "mpegts", "yuv420p"), ("wmv2", "asf", "yuv420p"),
        ("mjpeg", "avi", "yuvj420p"), ("prores_ks", "mov", "yuv422p10le"), ("ffv1", "matroska", "yuv420p10le"),
    ]:  # fmt: skip
        data = encoded(codec, form, pix_fmt)
        found = probe(io.BytesIO(data))
        assert (found.width, found.height, found.frames) == (128, 64, 6), (codec, form)
        assert found.duration == pytest.approx(0.5, abs=0.05), (codec, form)
        pixels = decoded(data)
        assert np.array_equal(pixels, reference(data)[:6]), (codec, form, pix_fmt)
        error = np.abs(pixels.astype(int) - [scene(k, (128, 64)) for k in range(6)]).mean()
        assert error < (6 if codec in ("mpeg4", "mpeg2video", "wmv2", "mjpeg", "libsvtav1") else 3), (codec, error)


def test_an_animated_gif_gives_ffmpegs_pixels() -> None:
    container = av.open(target := io.BytesIO(), "w", format="gif")
    stream = container.add_stream("gif", rate=Fraction(25, 2))
    stream.width, stream.height, stream.pix_fmt = 64, 32, "rgb8"
    for k in range(5):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(scene(k, (64, 32)), format="rgb24")))
    container.mux(stream.encode())
    container.close()
    data = target.getvalue()
    found = probe(io.BytesIO(data))
    assert (found.codec, found.frames, found.duration) == ("gif", 5, pytest.approx(0.4))
    assert np.array_equal(decoded(data, 4), reference(data)[:4])


MATRICES = {BT709: "bt709", BT470BG: "bt601", SMPTE170M: "bt601", BT2020: "bt2020"}


@pytest.mark.parametrize(("codec", "form"), [("libx264", "mp4"), ("libx265", "mp4"), ("libvpx-vp9", "webm")])
@pytest.mark.parametrize("bits", [8, 10])
def test_matrix_and_range_are_those_that_the_file_states(codec, form, bits) -> None:
    """Against a filter that is told both by hand; another matrix, or the other range, is more than 1.5 levels off on average."""
    if codec == "libvpx-vp9" and bits == 10:
        codec, form = "libsvtav1", "mp4"  # this build of the VP9 encoder has no 10 bit; AV1 has
    pix_fmt = "yuv420p" if bits == 8 else "yuv420p10le"
    for matrix, name in MATRICES.items():
        for span, tag in ((LIMITED, "limited"), (FULL, "full")):
            data = encoded(codec, form, pix_fmt, matrix, span, frames=2)
            pixels = decoded(data, 2).astype(int)
            told = reference(data, f"in_color_matrix={name}:in_range={tag}").astype(int)
            assert np.abs(pixels - told).max() == 0, (codec, bits, name, tag)
            other = "bt601" if name == "bt709" else "bt709"
            wrong = reference(data, f"in_color_matrix={other}:in_range={tag}").astype(int)
            assert np.abs(pixels - wrong).mean() > 1.5, (codec, bits, name, tag)
            if span == LIMITED:  # 8-bit full range has a pixel format of its own (yuvj420p), which no option overrides
                wrong = reference(data, f"in_color_matrix={name}:in_range=full").astype(int)
                assert np.abs(pixels - wrong).mean() > 1.5, (codec, bits, name, tag)


@pytest.mark.parametrize("size", [(128, 64), (1280, 720)])
def test_colours_that_a_file_does_not_state_are_bt601_limited_at_any_size(size) -> None:
    """ffmpeg's own rule. Players guess BT.709 for large pictures; a file that means it should say it."""
    data = encoded("libx264", "mp4", size=size, frames=2)
    pixels = decoded(data, 2)
    assert np.array_equal(pixels, reference(data, "in_color_matrix=bt601:in_range=limited"))
    assert np.array_equal(pixels, reference(data))


@pytest.mark.parametrize("matrix", [BT709, BT470BG])
@pytest.mark.parametrize("span", [LIMITED, FULL])
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv444p10le"])
def test_rgb_is_the_formula_of_h273(matrix, span, pix_fmt) -> None:
    """In float64, from the stored Y'CbCr: at most 2 of 255 apart, for 10 bit (which ffmpeg dithers) 3."""
    data = encoded("ffv1", "matroska", pix_fmt, matrix, span, frames=1)
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
    deep = pix_fmt.endswith("10le")
    stored = [np.frombuffer(p, dtype="<u2" if deep else "u1") for p in frame.planes]
    stored = [p.reshape(64, -1)[:, :128].astype(np.float64) / (4 if deep else 1) for p in stored]
    kr, kb = (0.2126, 0.0722) if matrix == BT709 else (0.299, 0.114)
    full = span == FULL
    y = stored[0] / 255 if full else (stored[0] - 16) / 219
    cb, cr = ((plane - 128) / (255 if full else 224) for plane in stored[1:])
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    expected = (np.stack([red, green, blue], -1) * 255).clip(0, 255)
    assert np.abs(decoded(data, 1)[0] - expected).max() <= (3 if deep else 2)


@pytest.mark.parametrize(
    ("codec", "form", "pix_fmt", "size"),
    [("libvpx-vp9", "webm", "yuv420p", (127, 65)), ("ffv1", "matroska", "yuv420p", (33, 17)),
     ("libx264", "mp4", "yuv444p", (127, 65)), ("mjpeg", "avi", "yuvj420p", (99, 51)),
     ("libx264", "mp4", "yuv420p", (130, 66))],
)  # fmt: skip
def test_odd_sizes_give_ffmpegs_pixels(codec, form, pix_fmt, size) -> None:
    data = encoded(codec, form, pix_fmt, size=size)
    assert (probe(io.BytesIO(data)).width, probe(io.BytesIO(data)).height) == size
    assert np.array_equal(decoded(data), reference(data))


@pytest.mark.parametrize(("codec", "form"), [("libx264", "mp4"), ("libvpx-vp9", "webm")])
def test_a_sound_track_in_front_changes_nothing(codec, form) -> None:
    silent, loud = encoded(codec, form), encoded(codec, form, sound=True)
    with av.open(io.BytesIO(loud)) as container:
        assert [stream.type for stream in container.streams] == ["audio", "video"]
    assert probe(io.BytesIO(loud)).frames == 6
    assert np.array_equal(decoded(loud), decoded(silent))


def test_a_turned_clip_of_pixels_that_are_not_square_is_told_as_it_is_shown() -> None:
    found = probe(io.BytesIO(data := encoded("libx264", "mp4", aspect=Fraction(4, 3), rotate=90)))
    assert (found.width, found.height, found.pixel_aspect) == (64, 128, pytest.approx(3 / 4))
    assert np.array_equal(decoded(data), reference(data, "", ("transpose", "cclock")))


def test_transparency_is_dropped() -> None:
    data = encoded("ffv1", "matroska", "yuva420p")
    assert np.array_equal(decoded(data), decoded(encoded("ffv1", "matroska", "yuv420p")))


def edited(data: bytes, entries: Sequence[tuple[int, int]]) -> bytes:
    """With the one entry of its edit list replaced. entries: (duration in ms, media time in the track's units)."""
    at = data.index(b"elst")
    assert struct.unpack(">I", data[at + 8 : at + 12]) == (1,)
    (entry,) = entries
    return data[: at + 12] + struct.pack(">Ii", *entry) + data[at + 20 :]


@pytest.mark.parametrize(("milliseconds", "skipped"), [(2000, 5), (1000, 30), (500, 0), (2000, 40)])
def test_an_edit_list_shows_what_it_says(make_video, milliseconds, skipped) -> None:
    """Cut at both ends, inside a group of pictures too; also one that claims more than the file has."""
    plain = make_video(frames=48, fps=24, gop=12)
    at = plain.index(b"elst")
    _, media_time = struct.unpack(">Ii", plain[at + 12 : at + 20])
    data = edited(plain, [(milliseconds, media_time + skipped * 512)])
    expected = reference(data)[::2]
    shown = min(48 - skipped, 24 * milliseconds // 1000)
    found = probe(io.BytesIO(data))
    assert (found.frames, found.duration) == (shown, pytest.approx(shown / 24, abs=0.05))
    count = shown // 2
    assert np.array_equal(decoded(data, count), expected[:count])
    if not skipped % 2:
        assert np.array_equal(decoded(data, count), reference(plain)[skipped::2][:count])


class Counting(io.BytesIO):
    """A file that counts the bytes it gives."""

    given = 0

    def read(self, size: int | None = -1) -> bytes:
        part = super().read(size)
        self.given += len(part)
        return part


def test_the_window_of_a_long_clip_is_sought() -> None:
    """A window near the end reads a fraction of the file, and gets the pixels that decoding from the start gets."""
    noise = np.random.default_rng(1).integers(0, 256, (300, 128, 128, 3), dtype=np.uint8)
    with av.open(target := io.BytesIO(), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt, stream.options = 128, 128, "yuv420p", {"crf": "1", "g": "12"}
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = target.getvalue()
    file = Counting(data)
    pixels = decode(file, whole(probe(io.BytesIO(data)), 12, 23.0), 23.0)
    assert np.array_equal(pixels.permute(1, 2, 3, 0).numpy(), reference(data)[276:288])
    assert len(data) > 6 << 20
    assert file.given < len(data) / 2


def test_a_tag_of_dolby_vision_without_a_base_layer_is_refused() -> None:
    data = encoded("libx265", "mp4", "yuv420p10le").replace(b"hev1", b"dvhe")
    with pytest.raises(FileFault, match=r"high dynamic range \(Dolby Vision\)"):
        probe(io.BytesIO(data))


def test_colours_that_cannot_be_converted_are_named() -> None:
    data = encoded("libx264", "mp4", matrix=8, frames=1)  # YCgCo
    with pytest.raises(FileFault, match=r"its pixels \(yuv420p, matrix 8 of H\.273\) cannot be converted to RGB"):
        decoded(data, 1)
