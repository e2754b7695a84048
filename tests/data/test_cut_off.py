"""Files that end before their container says, found when they are probed; and sound ones, which are not taken for such."""

from __future__ import annotations

import io
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vtrain.data.decoding.probe import probe
from vtrain.data.decoding.video import FileFault
from vtrain.data.scanning.scan import scan

FRONT = {"movflags": "faststart"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


def cut(data: bytes, share: float) -> io.BytesIO:
    return io.BytesIO(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("form", "codec", "options", "said"),
    [
        ("mp4", "libx264", FRONT, r", \d+ of 60 frames are there"),
        ("mov", "mpeg4", FRONT, r", \d+ of 60 frames are there"),
        ("mp4", "libx264", FRAGMENTS, r", \d+ of at least \d+ bytes are there"),
        ("matroska", "libx264", {}, r", \d\.\d+ of 5\.000 s are there"),
        ("webm", "libvpx", {"cues_to_front": "1"}, r", (\d+ of at least \d+ bytes|\d\.\d+ of 5\.000 s) are there"),
        ("avi", "mpeg4", {}, r", \d\.\d+ of 5\.000 s are there"),
        ("flv", "flv", {}, r", \d\.\d+ of 5\.000 s are there"),
        ("asf", "wmv2", {}, r", \d\.\d+ of 5\.000 s are there"),
        ("mpegts", "libx264", {}, " within a packet"),
        ("mpeg", "mpeg2video", {}, " within a packet"),
        ("vob", "mpeg2video", {}, " within a packet"),
        ("ogg", "libvpx", {}, " within a page"),
        ("gif", "gif", {}, " within a picture"),
    ],
)  # fmt: skip
def test_a_file_that_ends_before_its_container_says_is_named_with_what_is_there(
    make_video, form, codec, options, said
) -> None:
    # 25 a second: MPEG-1 and 2 know few rates.
    fps = 25 if form in ("mpeg", "vob") else 12
    data = make_video(frames=60, fps=fps, gop=10, form=form, codec=codec, options=options)
    assert probe(io.BytesIO(data)).frames == 60
    for share in (0.47, 0.57):
        with pytest.raises(FileFault, match=rf"^is cut off{said}: an unfinished download, copy or recording\?$"):
            probe(cut(data, share))


def test_a_stream_of_fragments_that_ends_within_the_head_of_one_says_so(make_video) -> None:
    data = make_video(frames=60, fps=12, gop=10, options=FRAGMENTS)
    at = data.index(b"moof", data.index(b"moof") + 1)
    with pytest.raises(FileFault, match="the file ends within a fragment"):
        probe(io.BytesIO(data[: at + 40]))


def test_an_animated_png_is_counted(make_video) -> None:
    target = io.BytesIO()
    with av.open(target, "w", format="apng") as container:
        stream = container.add_stream("apng", rate=12)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "rgb24"
        for k in range(12):
            frame = np.random.default_rng(k).integers(0, 255, (16, 32, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert probe(io.BytesIO(target.getvalue())).frames == 12
    with pytest.raises(FileFault, match=r"is cut off, [4-8] of 12 frames are there"):
        probe(cut(target.getvalue(), 0.5))


def with_sound(form: str, codec: str, sound: str, seconds: float, **options: str) -> bytes:
    """Two seconds of pictures, some shown longer than others where the container allows it, and sound."""
    with tempfile.NamedTemporaryFile() as target:
        with av.open(target.name, "w", format=form, options=options) as container:
            video, audio = container.add_stream(codec, rate=25), container.add_stream(sound, rate=48000)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            packets = []
            for k in range(50):
                grey = np.full((48, 64, 3), 4 * k, dtype=np.uint8)
                packets += video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24"))
            packets += video.encode()
            samples = audio.codec_context.frame_size or 1024
            for k in range(int(seconds * 48000 / samples)):
                frame = av.AudioFrame(audio.codec_context.format.name, audio.codec_context.layout.name, samples)
                for plane in frame.planes:
                    plane.update(bytes(plane.buffer_size))
                frame.rate, frame.pts, frame.time_base = 48000, k * samples, Fraction(1, 48000)
                packets += audio.encode(frame)
            packets += audio.encode()
            for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
                container.mux(packet)
        return Path(target.name).read_bytes()


@pytest.mark.parametrize(
    ("form", "codec", "sound", "options"),
    [
        ("mp4", "libx264", "aac", FRONT), ("mp4", "libx264", "aac", FRAGMENTS), ("matroska", "libx264", "aac", {}),
        ("avi", "mpeg4", "mp2", {}), ("mpegts", "libx264", "aac", {}),
        ("mpeg", "mpeg2video", "mp2", {}), ("flv", "libx264", "aac", {}), ("ogg", "libvpx", "libopus", {}),
    ],
)  # fmt: skip
def test_sound_that_is_longer_or_shorter_than_the_pictures_makes_no_file_cut(form, codec, sound, options) -> None:
    for seconds in (0.5, 3.0):
        data = with_sound(form, codec, sound, seconds, **options)
        assert probe(io.BytesIO(data)).frames == 50, seconds


@pytest.mark.parametrize("form", ["mp4", "matroska", "mpegts", "avi", "flv"])
def test_a_variable_rate_makes_no_file_cut(make_video, form) -> None:
    times = [k / 30 if k < 10 else 10 / 30 + (k - 10) / 10 for k in range(20)]
    codec = {"avi": "mpeg4", "flv": "flv"}.get(form, "libx264")
    found = probe(io.BytesIO(make_video(frames=20, times=times, b_frames=0, form=form, codec=codec)))
    assert (found.frames, found.variable) == (20, True)


def test_what_only_an_index_lost_is_whole(make_video) -> None:
    """The last bytes of Matroska and AVI are indexes."""
    for form, codec, lost in (("matroska", "libx264", 8), ("avi", "mpeg4", 100)):
        data = make_video(frames=40, form=form, codec=codec)
        assert probe(io.BytesIO(data[:-lost])).frames == 40
    stream = make_video(frames=40, form="mpegts")
    assert probe(io.BytesIO(stream + bytes(50))).frames == 40, "bytes behind the last packet"
    stream = make_video(frames=40, form="gif", codec="gif")
    assert probe(io.BytesIO(stream[:-1])).frames == 40, "no end mark"
    assert probe(io.BytesIO(stream + b"a comment")).frames == 40


def test_a_cut_file_fails_in_the_scan_also_where_its_window_is_there(setup, make_video) -> None:
    setup.add("whole.mkv", make_video(frames=60, form="matroska"))
    setup.add("cut.mkv", make_video(frames=60, form="matroska")[:-1500])
    found = scan(setup.plan())
    assert [sample.ref_id for sample in found.samples] == ["whole.mkv"]
    ((reason, (_, example)),) = found.survey.datasets[0].skipped.items()
    assert (reason.partition(",")[0], example) == ("is cut off", "cut.mkv")
