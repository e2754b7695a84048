"""Decoded pixels, against ffmpeg's own filters and a float64 reference."""

import hashlib
import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from vtrain.contract import Caption, ClipShape, FrameRule, Size
from vtrain.data.decoding.decode import decode, unit_range
from vtrain.data.decoding.probe import probe
from vtrain.data.decoding.spool import hashed
from vtrain.data.decoding.video import FileFault
from vtrain.data.sample import Box, Sample
from vtrain.data.scanning.fitting import fit

ANY = FrameRule(1, 1)


def sample_of(data: bytes, dataset) -> Sample:
    """The sample that a scan makes of a file."""
    source = probe(io.BytesIO(data))
    place = fit(source, dataset, ANY)
    return Sample(
        id="clips/x.mp4", dataset="clips", place=0, ref_id="x.mp4", size=len(data), version="1",
        picture=Size(source.width, source.height), box=place.cuts[0].box, shape=place.shape, fps=place.fps,
        starts=place.cuts[0].starts, crop=dataset.table.crop, captions=(Caption(""),),
    )  # fmt: skip


def ffmpeg(data: bytes, *filters: tuple[str, str]) -> np.ndarray:
    """All frames (F, h, w, 3) through ffmpeg's filters and its conversion to RGB."""
    frames = []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        chain = [graph.add_buffer(template=stream, time_base=stream.time_base)]
        chain += [graph.add(name, arguments) for name, arguments in (*filters, ("format", "rgb24"))]
        chain.append(graph.add("buffersink"))
        graph.link_nodes(*chain).configure()

        def drain() -> None:
            while True:
                try:
                    frames.append(graph.vpull().to_ndarray())
                except (BlockingIOError, EOFError):
                    return

        for frame in container.decode(stream):
            graph.vpush(frame)
            drain()
        graph.vpush(None)
        drain()
    return np.stack(frames)


def pixels_of(data: bytes, sample: Sample) -> np.ndarray:
    """decode() as (F, h, w, 3)."""
    pixels = decode(io.BytesIO(data), sample, sample.starts[0])
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, *sample.shape)
    return pixels.permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize(
    ("name", "fps"), [("bunny_00", 16), ("bunny_00", 24), ("city_00", 10), ("box_00", 20), ("vtest_00", 10)]
)
def test_without_a_resize_pixels_equal_ffmpegs_frames_at_those_times(setup, clips, name, fps) -> None:
    """ffmpeg's fps filter chooses the frames, its swscale converts them; at most 1 of 255 apart."""
    data = (clips / f"{name}.mp4").read_bytes()
    source = probe(io.BytesIO(data))
    dataset = setup.dataset(sizes=[(source.width, source.height)], frames=20, fps=fps)
    found = pixels_of(data, sample_of(data, dataset))
    expected = ffmpeg(data, ("fps", f"{fps}:round=up"))[:20]
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_variable_frame_rate_is_resampled_as_ffmpeg_does(setup, make_video) -> None:
    times = [k / 50 if k < 30 else 30 / 50 + (k - 30) / 12.5 for k in range(50)]
    data = make_video(frames=50, times=times, b_frames=0)
    found = pixels_of(data, sample_of(data, setup.dataset(frames=33, fps=16)))
    assert np.array_equal(found, ffmpeg(data, ("fps", "16:round=up"))[:33])


def test_matroska_at_half_its_rate_takes_every_second_frame(setup, make_video) -> None:
    """Its timestamps are rounded to milliseconds; without slack some odd frame would be taken."""
    data = make_video(frames=40, fps=30, form="matroska")
    found = pixels_of(data, sample_of(data, setup.dataset(frames=20, fps=15)))
    assert np.array_equal(found, ffmpeg(data)[::2])


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_clip_comes_out_upright(setup, make_video, degrees) -> None:
    """PyAV tells how far to turn a frame counter-clockwise, apart from the display matrix that decode() reads."""
    data = make_video(frames=18, fps=16, rotate=degrees)
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
        expected = np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90)
    size = (64, 128) if degrees != 180 else (128, 64)
    found = pixels_of(data, sample_of(data, setup.dataset(sizes=[size])))
    assert np.array_equal(found[0], expected)


def test_a_mirrored_clip_comes_out_as_players_show_it(setup, make_video) -> None:
    data = make_video(frames=18, fps=16, rotate=0, mirror=True)
    found = pixels_of(data, sample_of(data, setup.dataset()))
    assert np.array_equal(found[0], ffmpeg(data)[0][:, ::-1])


def triangle_weights(source: int, target: int) -> np.ndarray:
    """(target, source) float64: linear interpolation, its kernel widened by the scale when it shrinks."""
    scale = source / target
    support = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(source) + 0.5 - centres[:, None])
    weights = np.clip(1 - distance / support, 0, None)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(208, 128), (128, 128), (96, 160)])
def test_a_resize_is_one_antialiased_resample_of_the_centred_part(setup, clips, size) -> None:
    """Against the triangle filter in float64: rounding of 8-bit weights and of two passes stays within 2 of 255."""
    data = (clips / "city_00.mp4").read_bytes()
    sample = sample_of(data, setup.dataset(sizes=[size], frames=1))
    left, top, width, height = sample.box
    assert abs(width / height - size[0] / size[1]) < 0.01
    assert abs(left - (456 - width) / 2) <= 0.5
    assert abs(top - (256 - height) / 2) <= 0.5
    part = ffmpeg(data)[0][top : top + height, left : left + width].astype(np.float64)
    rows, columns = triangle_weights(height, size[1]), triangle_weights(width, size[0])
    expected = np.einsum("yh,xw,hwc->yxc", rows, columns, part, optimize=True)
    assert np.abs(pixels_of(data, sample)[0] - expected).max() <= 2


def test_crop_none_squeezes_the_whole_frame(setup, make_video) -> None:
    data = make_video(frames=18, fps=16, size=(256, 64))
    sample = sample_of(data, setup.dataset(sizes=[(64, 64)], crop="none"))
    assert sample.box == Box(0, 0, 256, 64)
    first = pixels_of(data, sample)[0].astype(int)
    assert abs(first[4, 4] - (250, 0, 0)).max() < 20  # red: still in its corner
    assert abs(first[4, -4] - (0, 250, 0)).max() < 20
    assert abs(first[-4, 4] - (0, 0, 250)).max() < 20


def test_pixels_that_are_not_square_are_stretched_to_what_players_show(setup, make_video) -> None:
    """128x64 with pixels twice as wide as high is shown as 256x64; its middle square is 32 stored pixels wide."""
    data = make_video(frames=18, fps=16, aspect=Fraction(2))
    sample = sample_of(data, setup.dataset(sizes=[(64, 64)], upscale=True))
    assert sample.box == Box(48, 0, 32, 64)


@pytest.mark.parametrize("gop", [12, 300])
def test_a_window_in_the_middle_of_a_long_clip_is_the_same_as_decoding_up_to_it(setup, make_video, gop) -> None:
    data = make_video(frames=240, fps=24, size=(64, 64), gop=gop)
    dataset = setup.dataset(sizes=[(64, 64)], frames=33, fps=16, video={"window": "center"})
    sample = sample_of(data, dataset)
    assert sample.starts[0] == pytest.approx((160 - 33) // 2 / 16)
    first = round(sample.starts[0] * 16)
    assert np.array_equal(pixels_of(data, sample), ffmpeg(data, ("fps", "16:round=up"))[first : first + 33])


def test_a_truncated_clip_fails_with_both_numbers(setup, make_video) -> None:
    data = make_video(frames=48, options={"movflags": "faststart"})
    sample = sample_of(data, setup.dataset(frames=29))
    for share in (0.5, 0.7, 0.9):
        with pytest.raises(FileFault, match=r"only \d+ of 29 frames could be decoded|first frame|cannot be decoded"):
            decode(io.BytesIO(data[: int(len(data) * share)]), sample, sample.starts[0])


def test_a_picture_of_another_size_than_probed_is_refused(setup, make_video) -> None:
    sample = sample_of(make_video(frames=18, fps=16), setup.dataset())
    with pytest.raises(FileFault, match="its picture size changes from 128x64 to 64x64"):
        decode(io.BytesIO(make_video(frames=18, fps=16, size=(64, 64))), sample, sample.starts[0])


def test_unit_range_is_minus_one_to_one() -> None:
    assert unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


class Pipe(io.RawIOBase):
    """A file of some remote storage: seekable, but no local file. Counts the bytes it hands out."""

    def __init__(self, data: bytes) -> None:
        self.inner, self.given = io.BytesIO(data), 0

    def read(self, size: int = -1) -> bytes:
        data = self.inner.read(size)
        self.given += len(data)
        return data


def test_a_remote_file_is_fetched_once_and_hashed_on_the_way(setup, make_video) -> None:
    data = make_video(frames=18, fps=16)
    pipe = Pipe(data)
    with hashed(pipe) as (content, copy):
        assert content == hashlib.sha256(data).hexdigest()
        decode(copy, sample_of(data, setup.dataset()), 0.0)
    assert pipe.given == len(data)


def test_a_local_file_is_hashed_and_rewound(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    with (tmp_path / "a").open("rb") as stream, hashed(stream) as (content, copy):
        assert copy is stream
        assert content == hashlib.sha256(copy.read()).hexdigest()


def test_shapes_are_frames_height_width(setup, make_video) -> None:
    """Reversed sizes would show here: the bucket is wider than high, the tensor is (3, F, h, w)."""
    data = make_video(frames=18, fps=16)
    sample = sample_of(data, setup.dataset(sizes=[(96, 48)]))
    assert sample.shape == ClipShape(frames=17, height=48, width=96)
    assert decode(io.BytesIO(data), sample, sample.starts[0]).shape == (3, 17, 48, 96)
