"""Clips by torchcodec: pixels against ffmpeg's own, the files that it is not given, and entries of their own.

Measured with torchcodec 0.13.0 over ffmpeg 5.1: of the files that it is given, no pixel differs. So the tolerance is 0.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import runpy
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vtrain.data.caching.caches import fill_caches
from vtrain.data.decoding import torchcodec_frames
from vtrain.data.decoding.decode import decode
from vtrain.data.decoding.probe import probe
from vtrain.data.decoding.video import FileFault
from vtrain.data.decoding.worker import DecodeJob, Workers
from vtrain.data.scanning.scan import NotLoadable, find_torchcodec, scan

FOUND = find_torchcodec() if importlib.util.find_spec("torchcodec") else NotLoadable("torchcodec is not installed.", "")
pytestmark = pytest.mark.skipif(isinstance(FOUND, NotLoadable), reason=getattr(FOUND, "what", "torchcodec loads"))

FORMATS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_formats.py"))))
GIVEN = [
    ("libx264", "mp4", "yuv420p"), ("libx264", "matroska", "yuv420p10le"), ("libx264", "mov", "yuv422p"),
    ("libx265", "mp4", "yuv420p"), ("libx265", "matroska", "yuv420p10le"), ("libsvtav1", "mp4", "yuv420p"),
    ("libsvtav1", "webm", "yuv420p10le"), ("libvpx-vp9", "webm", "yuv420p"), ("libvpx-vp9", "mp4", "yuv444p"),
    ("mpeg4", "mp4", "yuv420p"), ("prores_ks", "mov", "yuv422p10le"), ("ffv1", "matroska", "yuv420p10le"),
    ("ffv1", "matroska", "yuva420p"), ("ffv1", "matroska", "bgr0"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """A process of a run has more threads than one; so torchcodec decodes with several here."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def by_torchcodec(data: bytes, frames: int = 6, start: float = 0.0) -> np.ndarray | str:
    """(F, h, w, 3) as the cache would get them, or why PyAV is to decode it."""
    sample = FORMATS.whole(probe(io.BytesIO(data)), frames, start)
    pixels = torch.zeros((3, *sample.shape), dtype=torch.uint8)
    unfit = torchcodec_frames.decode(io.BytesIO(data), sample, start, pixels)
    return unfit or pixels.permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize(("codec", "form", "pix_fmt"), GIVEN)
def test_codecs_give_ffmpegs_pixels_exactly(codec, form, pix_fmt) -> None:
    data = FORMATS.encoded(codec, form, pix_fmt)
    assert np.array_equal(by_torchcodec(data), FORMATS.reference(data)[:6])


@pytest.mark.parametrize(("codec", "form"), [("libx264", "mp4"), ("libx265", "mp4"), ("libvpx-vp9", "webm")])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
def test_matrix_and_range_are_those_that_the_file_states_or_pyav_takes_it(codec, form, pix_fmt) -> None:
    """Full range is taken for limited where the pixel format does not say it: more than 6 levels off on average."""
    from find_torchcodec.decoders import VideoDecoder

    if codec == "libvpx-vp9" and pix_fmt != "yuv420p":
        codec, form = "libsvtav1", "mp4"
    for matrix, name in FORMATS.MATRICES.items():
        for span, tag in ((FORMATS.LIMITED, "limited"), (FORMATS.FULL, "full")):
            data = FORMATS.encoded(codec, form, pix_fmt, matrix, span, frames=2)
            pixels = by_torchcodec(data, 2)
            told = FORMATS.reference(data, f"in_color_matrix={name}:in_range={tag}").astype(int)
            if span == FORMATS.FULL and (pix_fmt != "yuv420p" or codec == "libvpx-vp9"):
                assert pixels == f"its range is full ({pix_fmt})"
                wrong = VideoDecoder(data, dimension_order="NHWC")[0].numpy().astype(int)
                assert np.abs(wrong - told[0]).mean() > 6
            else:
                assert np.array_equal(pixels, told), (codec, pix_fmt, name, tag)


@pytest.mark.parametrize("size", [(127, 65), (33, 17), (1280, 720)])
def test_odd_and_large_sizes_give_ffmpegs_pixels(size) -> None:
    data = FORMATS.encoded("libvpx-vp9", "webm", size=size, frames=2)
    assert np.array_equal(by_torchcodec(data, 2), FORMATS.reference(data))


@pytest.mark.parametrize("rotate", [90, 180, 270])
def test_a_turned_clip_is_upright(make_video, rotate) -> None:
    data = make_video(frames=12, fps=12, rotate=rotate)
    assert np.array_equal(by_torchcodec(data), FORMATS.decoded(data))


def test_a_clip_of_pixels_that_are_not_square_keeps_them() -> None:
    data = FORMATS.encoded("libx264", "mp4", aspect=Fraction(4, 3), rotate=90)
    assert np.array_equal(by_torchcodec(data), FORMATS.decoded(data))


@pytest.mark.parametrize(
    ("what", "frames", "start"),
    [
        ({"frames": 8, "times": [0, 0.04, 0.05, 0.2, 0.21, 0.5, 0.54, 0.6], "form": "matroska"}, 7, 0.0),
        ({"frames": 8, "times": [0, 0.3, 0.35, 0.9, 1.3, 1.31, 1.32, 1.6], "form": "mp4"}, 18, 0.0),
        ({"frames": 300, "fps": 30, "gop": 12}, 12, 7.0),
        ({"frames": 90, "fps": 30000 / 1001, "gop": 250, "form": "matroska"}, 8, 2.3),
        ({"frames": 50, "fps": 25, "gop": 1}, 13, 0.52),
        ({"frames": 12, "fps": 6}, 23, 0.0),
        ({"frames": 12, "fps": 6}, 12, 0.9),
    ],
)
def test_windows_have_the_frames_that_are_on_screen(make_video, what, frames, start) -> None:
    """Variable rates, gaps, frames shown twice, and windows far behind a key frame."""
    data = make_video(**what)
    expected = FORMATS.decoded(data, frames, start)
    assert len(np.unique(expected[:, 32, 64, 0])) > 3
    assert np.array_equal(by_torchcodec(data, frames, start), expected)


def test_a_sound_track_in_front_changes_nothing() -> None:
    loud = FORMATS.encoded("libx264", "mp4", sound=True)
    assert np.array_equal(by_torchcodec(loud), FORMATS.reference(FORMATS.encoded("libx264", "mp4")))


def test_files_that_it_would_show_wrongly_are_left_to_pyav_with_the_reason(make_video) -> None:
    assert by_torchcodec(make_video(frames=12, fps=12, mirror=True)) == "it is mirrored"
    turned = by_torchcodec(make_video(frames=12, fps=12, mirror=True, rotate=90))
    assert turned == "it is mirrored, and turned by 90 degrees clockwise"
    for form, name in (("mpegts", "mpegts"), ("avi", "avi"), ("flv", "flv")):
        unfit = by_torchcodec(make_video(frames=12, fps=12, form=form))
        assert unfit == f"its container ({name}) is neither MP4, MOV, Matroska nor WebM"
    assert "its container (gif)" in by_torchcodec(make_video(frames=12, fps=12, form="gif", codec="gif"))


def test_an_edit_list_is_left_to_pyav_where_it_cuts_frames_off(make_video) -> None:
    plain = make_video(frames=48, fps=24, gop=12)
    _, begin = struct.unpack(">Ii", plain[plain.index(b"elst") + 12 :][:8])
    assert by_torchcodec(FORMATS.edited(plain, [(2000, begin + 5 * 512)])) == "its edit list cuts frames off"
    assert np.array_equal(
        by_torchcodec(plain), FORMATS.decoded(plain)
    )  # its list delays, for B-frames, and cuts nothing


def test_a_damaged_clip_is_judged_by_pyav(make_video) -> None:
    """Cut in its frames, behind an index that is whole."""
    data = make_video(frames=60, fps=12, gop=6, options={"movflags": "faststart"})
    cut = data[: len(data) * 3 // 4]
    assert by_torchcodec(cut, 60) == "it holds a damaged or cut packet"
    sample = FORMATS.whole(probe(io.BytesIO(data)), 60)
    with pytest.raises(FileFault, match=r"only \d+ of 60 frames could be decoded"):
        decode(io.BytesIO(cut), sample, 0.0)


class Remote(io.BytesIO):
    """Bytes without a file of this machine."""


def test_a_worker_decodes_local_and_remote_files_and_says_who_did_it(setup, make_video) -> None:
    right, mirrored = make_video(frames=24, fps=12), make_video(frames=24, fps=12, mirror=True)
    setup.add("right.mp4", right)
    setup.add("mirrored.mp4", mirrored)
    backend = setup.dataset().backend

    @dataclasses.dataclass
    class Storage:
        location: str = "memory"

        def open(self, ref):
            return Remote((setup.folder / ref.id).read_bytes())

    with Workers(1, limit_s=60) as workers:
        for name, data, unfit in (("right.mp4", right, ""), ("mirrored.mp4", mirrored, "it is mirrored")):
            sample = dataclasses.replace(FORMATS.whole(probe(io.BytesIO(data)), 12), ref_id=name, size=len(data))
            for place in (backend, Storage()):
                done = workers.done(DecodeJob(place, sample, 0.5, torchcodec=True))
                assert (done.fault, done.unfit) == (None, unfit)
                assert torch.equal(done.pixels, decode(io.BytesIO(data), sample, 0.5))
        assert len(workers._all) == 1  # loading torchcodec took no process down


def test_entries_by_torchcodec_are_their_own_and_hold_the_same_latents(setup, make_video) -> None:
    setup.add("a.mp4", make_video(frames=30, fps=24))
    plain = setup.dataset()
    other = dataclasses.replace(plain, decoder=FOUND)
    encoded = []
    for dataset in (plain, other, other, plain):
        plan = setup.plan(dataset)
        fill_caches(plan, scan(plan).samples, (), "cpu", lambda *_: None)
        encoded.append(setup.family.clips)
    assert encoded == [1, 2, 2, 2]
    first, second = (load_file(file) for file in (setup.cache / "video").rglob("*.safetensors"))
    assert torch.equal(first["mean"], second["mean"])
