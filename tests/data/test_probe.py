"""What headers say."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from vtrain.data.decoding.pixels import Orientation
from vtrain.data.decoding.probe import probe
from vtrain.data.decoding.video import FileFault


@pytest.mark.parametrize(
    ("form", "codec"),
    [
        ("mp4", "libx264"), ("mov", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"),
        ("mpegts", "mpeg2video"), ("mpeg", "mpeg1video"),
    ],
)  # fmt: skip
def test_every_container_tells_size_count_and_length(make_video, form, codec) -> None:
    found = probe(io.BytesIO(make_video(form=form, codec=codec)))
    assert (found.width, found.height, found.pixel_aspect, found.frames) == (128, 64, 1.0, 27)
    assert found.duration == pytest.approx(27 / 24, abs=0.0011)
    assert found.rate == pytest.approx(24, rel=0.001)


def test_an_animated_gif_is_a_video(make_video) -> None:
    found = probe(io.BytesIO(make_video(form="gif", codec="gif", fps=25)))
    assert (found.width, found.height, found.frames, found.duration) == (128, 64, 27, pytest.approx(1.08))


def test_a_fragmented_file_whose_header_has_no_count_is_counted_by_its_packets(make_video) -> None:
    found = probe(io.BytesIO(make_video(options={"movflags": "frag_keyframe+empty_moov"}, gop=5)))
    assert (found.frames, found.duration) == (27, pytest.approx(27 / 24))


@pytest.mark.parametrize("degrees", [90, 270])
def test_a_quarter_turn_exchanges_width_and_height(make_video, degrees) -> None:
    found = probe(io.BytesIO(make_video(rotate=degrees)))
    assert (found.width, found.height) == (64, 128)


def test_pixels_that_are_not_square_are_told_and_turned_with_the_picture(make_video) -> None:
    assert probe(io.BytesIO(make_video(aspect=Fraction(4, 3)))).pixel_aspect == pytest.approx(4 / 3)
    assert probe(io.BytesIO(make_video(aspect=Fraction(4, 3), rotate=90))).pixel_aspect == pytest.approx(3 / 4)


def test_pixels_within_a_hundredth_of_square_are_square(clips) -> None:
    with (clips / "bunny_00.mp4").open("rb") as stream:  # 512:513 in its header
        found = probe(stream)
    assert (found.width, found.height, found.pixel_aspect, found.frames, found.rate) == (456, 256, 1.0, 49, 24)


def test_a_variable_frame_rate_has_its_mean_rate_and_true_length(make_video) -> None:
    times = [k / 30 if k < 10 else 10 / 30 + (k - 10) / 10 for k in range(20)]
    found = probe(io.BytesIO(make_video(frames=20, times=times, b_frames=0)))
    assert found.frames == 20
    assert found.duration == pytest.approx(times[-1] + 0.1, abs=0.07)  # the last frame's own duration is the muxer's


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile:///etc/hostname\n"


@pytest.mark.parametrize("data", [b"just text\n" * 50, b"ffconcat version 1.0\nfile '/etc/hostname'\n", PLAYLIST])
def test_text_under_a_video_name_is_no_video_and_opens_no_other_file(data) -> None:
    with pytest.raises(FileFault, match=r"^cannot be read as a video: "):
        probe(io.BytesIO(data))


def test_a_file_cut_inside_its_header_is_named_as_unreadable(make_video) -> None:
    data = make_video(options={"movflags": "faststart"})
    for length in (20, 200, 600):
        with pytest.raises(FileFault, match=r"cannot be read as a video|is it truncated\?|ends within its index"):
            probe(io.BytesIO(data[:length]))


def test_a_file_with_only_sound_says_so(audio_only) -> None:
    with pytest.raises(FileFault, match=r"^holds no video, only sound$"):
        probe(io.BytesIO(audio_only))


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused_and_not_shown_washed_out(make_video, transfer, name) -> None:
    with pytest.raises(FileFault, match=rf"high dynamic range \({name}\)"):
        probe(io.BytesIO(make_video(transfer=transfer)))


class Unreadable(io.BytesIO):
    def read(self, size=-1):
        raise OSError(5, "Input/output error")


def test_a_fault_of_the_storage_may_pass() -> None:
    with pytest.raises(FileFault, match="Input/output error") as caught:
        probe(Unreadable(b"x"))
    assert not caught.value.lasting


@pytest.mark.parametrize(("degrees", "mirror"), [(d, m) for d in (0, 90, 180, 270) for m in (False, True)])
def test_how_a_picture_was_turned_is_told_in_words(make_video, degrees, mirror) -> None:
    data = make_video(rotate=degrees, mirror=mirror)
    words = probe(io.BytesIO(data)).turned
    stored = np.arange(6).reshape(2, 3)
    turns = {"180 degrees": 2, "90 degrees counterclockwise": 1, "90 degrees clockwise": 3}
    told = stored[:, ::-1] if words.startswith("mirrored") else stored
    told = np.rot90(told, turns[words.split("turned by ")[1]] if "turned by" in words else 0)
    with av.open(io.BytesIO(data)) as container:
        shown = Orientation.of(next(container.decode(video=0))).upright(stored[..., None])
    assert (told == shown[..., 0]).all()
    assert (words == "") == (degrees == 0 and not mirror)
