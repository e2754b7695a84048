"""A clip's place in its dataset: arithmetic over all clips and settings, and the words for what has none."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vtrain.config.data_tables import DataTable
from vtrain.contract import ClipShape, FrameRule, Size
from vtrain.data.decoding.probe import Probe
from vtrain.data.sample import Box, Skipped
from vtrain.data.scanning.fitting import Fit, decides, fit
from vtrain.plan.datasets import buckets, measure
from vtrain.plan.records import DatasetPlan

RULE = FrameRule(4, 1)


def clip(width: int = 640, height: int = 360, frames: int = 81, rate: float = 16, aspect: float = 1.0) -> Probe:
    return Probe("h264", width, height, aspect, frames, frames / rate)


def dataset(
    sizes: tuple[Size, ...] = (Size(640, 352),),
    frames: int = 17,
    min_frames: int | None = None,
    fps: float | None = 16.0,
    max_frames: int | None = None,
    crop_seed: int = 1,
    **table: Any,
) -> DatasetPlan:
    backend: Any = SimpleNamespace(location="/clips")
    return DatasetPlan(
        "clips", "config.toml:1", backend, DataTable.model_validate(table), sizes, frames,
        frames if min_frames is None else min_frames, fps, max_frames, crop_seed,
    )  # fmt: skip


def placed(source: Probe, plan: DatasetPlan, ref_id: str = "a.mp4") -> Fit:
    found = fit(source, plan, RULE, ref_id)
    assert isinstance(found, Fit), found
    return found


def left(source: Probe, plan: DatasetPlan) -> str:
    found = fit(source, plan, RULE)
    assert isinstance(found, Skipped), found
    assert found.status == "dropped"
    return f"{found.kind}: {found.reason}"


EDGES = st.integers(16, 4000)
CLIPS = st.builds(
    clip,
    width=EDGES,
    height=EDGES,
    frames=st.integers(1, 400),
    rate=st.sampled_from([8, 16, 24000 / 1001, 24, 25, 30000 / 1001, 50, 60]),
    aspect=st.sampled_from([1.0, 16 / 15, 0.75, 64 / 45]),
)


SKIPPED_CLIPS = (HealthCheck.filter_too_much,)
"""Which clips are long and large enough is the tested function's own matter; most of what is drawn is not."""


@st.composite
def plans(draw: st.DrawFn, crops: tuple[str, ...] = ("center", "random", "none")) -> DatasetPlan:
    number = draw(st.integers(1, 12)) * 60
    unit = draw(st.sampled_from(["pixel_area", "pixel"]))
    table: dict[str, Any] = {
        "crop": draw(st.sampled_from(crops)),
        "upscale": draw(st.booleans()),
        "resolution_type": unit,
    }
    if draw(st.booleans()):
        table |= {"max_size": draw(st.integers(500, 1000)), "downsample_to": draw(st.integers(100, 500))}
    video = {
        "window": draw(st.sampled_from(["start", "center", "all", "random"])),
        "windows": draw(st.integers(1, 6)),
        "frame_step": draw(st.integers(1, 4)),
        "repeat_frames": draw(st.booleans()),
        "round_to": draw(st.integers(1, 20)),
    }
    least, frames = sorted(4 * draw(st.integers(0, 20)) + 1 for _ in range(2))
    longest = draw(st.none() | st.integers(frames, 120))
    fps = draw(st.none() | st.sampled_from([8.0, 10.0, 16.0, 24.0]))
    sizes = buckets(number, unit, draw(st.sampled_from([8, 16, 32])))
    return dataset(sizes, frames, least, fps, longest, draw(st.integers(0, 9)), video=video, **table)


@settings(max_examples=400, deadline=None)
@given(source=CLIPS, plan=plans())
def test_whatever_the_clip_and_the_settings_windows_and_boxes_lie_inside_it(source: Probe, plan: DatasetPlan) -> None:
    found = fit(source, plan, RULE, "a.mp4")
    assert found == fit(source, plan, RULE, "a.mp4")
    if isinstance(found, Skipped):
        assert found.reason
        return
    shape, video = found.shape, plan.table.video
    assert RULE.accepts(shape.frames)
    assert plan.min_frames <= shape.frames <= plan.frames
    assert shape.size in plan.sizes
    assert found.fps == pytest.approx((plan.fps or source.rate) / video.frame_step)
    if source.frames > 1:
        # The last frame of each window is on screen before the clip ends.
        ends = [start + (shape.frames - 1) / found.fps for cut in found.cuts for start in cut.starts]
        assert max(ends) < source.duration
    for cut in found.cuts:
        assert all(start >= 0 for start in cut.starts)
        assert len(cut.starts) <= (video.windows if video.window == "random" else 1)
        assert cut.box.left >= 0
        assert cut.box.top >= 0
        assert cut.box.left + cut.box.width <= source.width
        assert cut.box.top + cut.box.height <= source.height
        if not plan.table.upscale:
            assert cut.box.width >= shape.width
            assert cut.box.height >= shape.height


@settings(max_examples=400, deadline=None, suppress_health_check=SKIPPED_CLIPS)
@given(source=CLIPS, plan=plans(crops=("center", "random")))
def test_a_cropped_part_has_the_buckets_aspect_within_a_pixel(source: Probe, plan: DatasetPlan) -> None:
    found = fit(source, plan, RULE, "a.mp4")
    assume(isinstance(found, Fit))
    assert isinstance(found, Fit)
    box, size = found.cuts[0].box, found.shape.size
    # Of the exact part, (w, h) with w * pixel aspect / h = the bucket's aspect, each edge is rounded by at most half a pixel.
    exact = box.height * size.aspect / source.pixel_aspect
    assert abs(box.width - exact) <= 0.5 + 0.5 * size.aspect / source.pixel_aspect + 1e-6
    if not plan.table.max_size:
        assert box.width == source.width or box.height == source.height


@settings(max_examples=300, deadline=None, suppress_health_check=SKIPPED_CLIPS)
@given(source=CLIPS, plan=plans())
def test_the_bucket_is_the_one_of_nearest_aspect(source: Probe, plan: DatasetPlan) -> None:
    found = fit(source, plan, RULE, "a.mp4")
    assume(isinstance(found, Fit))
    assert isinstance(found, Fit)
    shown = source.width * source.pixel_aspect / source.height
    nearest = min(abs(math.log(size.aspect / shown)) for size in plan.sizes)
    assert abs(math.log(found.shape.size.aspect / shown)) == pytest.approx(nearest)


def test_every_nth_frame_is_taken_after_resampling_and_the_reason_counts_so() -> None:
    plan = dataset(frames=17, video={"frame_step": 3})
    found = placed(clip(frames=81, rate=24), plan)
    assert (found.fps, found.shape.frames) == (16 / 3, 17)
    assert left(clip(frames=48, rate=24), plan) == (
        "too short: 11 frames, every 3rd at 16 fps (48 at the file's 24); needs 17: set data.video.min_frames = 9 or "
        "data.video.frame_step = 1"
    )
    assert placed(clip(frames=48, rate=24), dataset(frames=17, video={"frame_step": 1})).shape.frames == 17
    assert placed(clip(frames=48, rate=24), dataset(frames=17, min_frames=9, video={"frame_step": 3}))


@pytest.mark.parametrize(("interval", "words"), [(2, "2nd"), (4, "4th"), (11, "11th"), (21, "21st"), (22, "22nd")])
def test_numbers_in_a_reason_are_written_as_one_says_them(interval: int, words: str) -> None:
    assert f"every {words} at 16 fps" in left(clip(frames=20), dataset(video={"frame_step": interval}))


def test_at_the_clips_own_rate_every_frame_counts() -> None:
    plan = dataset(frames=81, fps=None)
    for rate in (8, 16, 23.976, 25, 29.97, 59.94, 240):
        found = placed(clip(frames=81, rate=rate), plan)
        assert found.fps == pytest.approx(rate)
        assert found.shape.frames == 81
    assert left(clip(frames=80, rate=25), plan) == (
        "too short: 80 frames (80 in the file); needs 81: set data.video.min_frames = 77"
    )
    assert left(clip(frames=80, rate=25), dataset(frames=81, fps=None, video={"frame_step": 2})) == (
        "too short: 40 frames, every 2nd (80 in the file); needs 81: set data.video.min_frames = 37"
    )


def test_a_source_slower_than_what_is_taken_of_it_is_left_out_and_one_between_is_not() -> None:
    plan = dataset(video={"frame_step": 2})
    assert placed(clip(frames=60, rate=10), plan).fps == 8
    assert left(clip(frames=60, rate=6), plan) == (
        "too slow: 6 frames per second in the file, fewer than the 8 of data.video.fps / frame_step (16 / 2): frames "
        "would be repeated; set data.video.fps to 12 or less, or data.video.repeat_frames = true"
    )
    assert placed(clip(frames=60, rate=6), dataset(fps=12.0, video={"frame_step": 2})).fps == 6


def test_a_still_picture_is_one_frame_however_long_it_is_shown() -> None:
    still = clip(frames=1, rate=0.2)
    assert placed(still, dataset(frames=17, min_frames=1)).shape.frames == 1
    assert left(still, dataset(frames=17)).endswith("needs 17: set data.video.min_frames = 1")
    assert placed(still, dataset(frames=17, video={"repeat_frames": True})).shape.frames == 17


def test_a_window_is_from_the_start_the_centre_everywhere_or_one_of_a_set() -> None:
    source = clip(frames=57)  # 40 more than a window
    starts = {
        window: [cut.starts for cut in placed(source, dataset(video={"window": window})).cuts]
        for window in ("start", "center", "all", "random")
    }
    assert starts == {
        "start": [(0.0,)],
        "center": [(20 / 16,)],
        "all": [(0.0,), (17 / 16,), (34 / 16,)],
        "random": [(0.0, 13 / 16, 27 / 16, 40 / 16)],
    }


def test_a_clip_longer_than_max_frames_is_cut_into_pieces_and_not_lost() -> None:
    found = placed(clip(frames=100), dataset(max_frames=40, video={"window": "center"}))
    assert [cut.starts for cut in found.cuts] == [(11 / 16,), (51 / 16,), (71 / 16,)]
    assert found.shape.frames == 17


def test_a_clip_of_years_is_left_out_before_its_windows_are_counted_out() -> None:
    years = Probe("gif", 640, 352, 1.0, 2, 1e9, 5e8)
    for more in (
        {"video": {"window": "all", "repeat_frames": True}},
        {"max_frames": 40, "video": {"repeat_frames": True}},
    ):
        assert left(years, dataset(**more)).startswith("too long: 16000000000 frames after resampling would be ")
    (only,) = placed(years, dataset(video={"repeat_frames": True})).cuts
    assert only.starts == (0.0,)
    assert len(placed(clip(frames=50_000), dataset(video={"window": "all"})).cuts) == 2941


def test_by_resolution_and_frames_each_clip_is_as_long_as_it_can_be() -> None:
    plan = dataset(frames=81, min_frames=17, max_frames=81, video={"bucket_by": "resolution_frames", "round_to": 16})
    lengths = {frames: placed(clip(frames=frames), plan).shape.frames for frames in (17, 32, 33, 50, 80, 81, 100)}
    assert lengths == {17: 17, 32: 17, 33: 33, 50: 49, 80: 65, 81: 81, 100: 81}
    assert [cut.starts for cut in placed(clip(frames=130), plan).cuts] == [(0.0,), (49 / 16,)]
    assert left(clip(frames=16), plan).startswith("too short: 16 frames at 16 fps")


def test_a_random_place_is_the_seeds_and_the_clips_and_differs_between_its_samples() -> None:
    source = clip(width=1000, height=400, frames=200)
    plan = dataset(sizes=(Size(320, 320),), crop="random", video={"window": "all"})
    boxes = [cut.box for cut in placed(source, plan).cuts]
    assert len(boxes) == 12
    assert len(set(boxes)) > 9
    assert all((box.top, box.width, box.height) == (0, 400, 400) for box in boxes)
    assert boxes == [cut.box for cut in placed(source, plan).cuts]
    assert boxes != [cut.box for cut in placed(source, plan, "b.mp4").cuts]
    other = dataset(sizes=(Size(320, 320),), crop="random", crop_seed=2, video={"window": "all"})
    assert boxes != [cut.box for cut in placed(source, other).cuts]
    lefts = [placed(source, plan, f"{n}.mp4").cuts[0].box.left for n in range(300)]
    assert min(lefts) < 20
    assert max(lefts) > 580
    assert sum(lefts) / 300 == pytest.approx(300, abs=40)


def test_a_random_place_moves_both_ways_and_each_by_itself() -> None:
    limits = {"resolution_type": "pixel", "max_size": 100, "downsample_to": 100}
    plan = dataset(sizes=(Size(64, 64),), crop="random", **limits)
    boxes = [placed(clip(width=1000, height=1000), plan, f"{n}.mp4").cuts[0].box for n in range(300)]
    assert {(box.width, box.height) for box in boxes} == {(640, 640)}
    for places in ([box.left for box in boxes], [box.top for box in boxes]):
        assert 0 <= min(places) < 20
        assert 340 < max(places) <= 360
    assert sum((box.left - 180) * (box.top - 180) for box in boxes) / 300 == pytest.approx(0, abs=2500)  # of 10800


def test_of_a_picture_above_max_size_the_bucket_takes_what_it_covers_after_the_reduction() -> None:
    big, sizes = clip(width=3840, height=2160), (Size(640, 352),)
    limits = {"resolution_type": "pixel", "max_size": 1080}
    assert placed(big, dataset(sizes)).cuts[0].box == Box(0, 24, 3840, 2112)
    # 720 lines: of 1280x720, the 640x352 at the centre: half of each edge.
    assert placed(big, dataset(sizes, downsample_to=720, **limits)).cuts[0].box == Box(960, 552, 1920, 1056)
    # Less than the bucket: the bucket covers the whole picture, and it is resampled once, from its own pixels.
    assert placed(big, dataset(sizes, downsample_to=300, **limits)).cuts[0].box == Box(0, 24, 3840, 2112)
    at_most = clip(width=1920, height=1080)
    assert placed(at_most, dataset(sizes, downsample_to=720, **limits)).cuts[0].box == Box(0, 12, 1920, 1056)
    squeezed = placed(big, dataset(sizes, downsample_to=720, crop="none", **limits))
    assert squeezed.cuts[0].box == Box(0, 0, 3840, 2160)


def test_a_reduced_picture_takes_the_largest_bucket_of_its_aspect_that_it_covers() -> None:
    big, sizes = clip(width=3840, height=2160), (Size(640, 360), Size(1280, 720), Size(1920, 1080))
    limits = {"max_size": 1440, "resolution_type": "pixel_area"}
    assert placed(big, dataset(sizes)).shape.size == (1920, 1080)
    chosen = {
        to: placed(big, dataset(sizes, downsample_to=to, **limits)).shape.size for to in (1440, 1439, 960, 959, 100)
    }
    assert chosen == {1440: (1920, 1080), 1439: (1280, 720), 960: (1280, 720), 959: (640, 360), 100: (640, 360)}


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        (
            "pixel_area",
            "640x352 (474.6, the edge of a square of its area) is below data.min_size = 480: set data.min_size to 474",
        ),
        ("pixel", "640x352 (352, its shorter edge) is below data.min_size = 480: set data.min_size to 352"),
    ],
)
def test_a_clip_below_min_size_is_left_out_whatever_the_crop(unit: str, words: str) -> None:
    for crop in ("center", "random", "none"):
        plan = dataset(min_size=480, resolution_type=unit, crop=crop, upscale=True)
        assert left(clip(height=352), plan) == f"too small: {words} or less"
    assert placed(clip(width=854, height=480), dataset(min_size=480, resolution_type=unit))


def test_the_change_of_aspect_is_known_where_the_picture_is_squeezed() -> None:
    assert placed(clip(width=704, height=352), dataset(crop="none")).stretch == pytest.approx(1.1)
    assert placed(clip(width=640, height=400), dataset(crop="none")).stretch == pytest.approx(400 / 352)
    # What a crop's rounding to whole pixels changes is no squeeze.
    assert placed(clip(width=721, height=541), dataset()).stretch == 1
    anamorphic = clip(width=704, height=352, aspect=640 / 704)
    assert placed(anamorphic, dataset(crop="none")).stretch == pytest.approx(1)


def test_what_a_crop_takes_away_is_known_and_nothing_is_where_the_picture_is_squeezed() -> None:
    assert placed(clip(width=704, height=352), dataset()).cropped == pytest.approx(1 - 640 / 704)
    portrait = placed(clip(width=720, height=1280), dataset())
    assert portrait.cropped == pytest.approx(1 - 396 / 1280)
    assert portrait.aspect == pytest.approx(720 / 1280)
    assert placed(clip(width=720, height=1280), dataset(crop="none")).cropped == 0
    reduced = dataset(max_size=500, downsample_to=960, resolution_type="pixel")
    assert placed(clip(width=1920, height=1056), reduced).cropped == pytest.approx(1 - 704 * 387 / (1920 * 1056))
    assert placed(clip(width=704, height=352, aspect=640 / 704), dataset()).aspect == pytest.approx(640 / 352)


def test_a_variable_rate_is_one_number_and_called_an_average() -> None:
    """20 frames in 2 s, of which the last is shown for a second: 19 a second, and not 10."""
    variable = Probe("h264", 640, 360, 1.0, 20, 2.0, 1.0, "", True)
    words = left(variable, dataset(fps=25.0, frames=5))
    assert words == (
        "too slow: 19 frames per second in the file on average, fewer than the 25 of data.video.fps: frames would be "
        "repeated; set data.video.fps to 19 or less, or data.video.repeat_frames = true"
    )
    assert "(20 at the file's 19 on average)" in left(variable, dataset(fps=8.0, frames=33))
    assert isinstance(fit(variable, dataset(fps=19.0, frames=5), RULE), Fit), "as the remedy says"
    assert variable.own_rate == 19


def test_the_area_and_the_shorter_edge_measure_a_picture() -> None:
    assert measure(832, 480, "pixel") == 480
    assert measure(640, 360, "pixel_area") == 480


def test_every_setting_that_moves_a_fit_is_among_those_that_decide(tmp_path: Path) -> None:
    plain = decides(dataset(), RULE)
    changes: list[dict[str, Any]] = [
        {"sizes": (Size(64, 64),)}, {"frames": 13, "min_frames": 13}, {"min_frames": 1}, {"fps": None}, {"max_frames": 40},
        {"crop": "random"}, {"crop": "none"}, {"upscale": True}, {"min_size": 3}, {"max_size": 3}, {"downsample_to": 3},
        {"resolution_type": "pixel"}, {"captions": "filename"}, {"caption": "x"}, {"caption_per": "line"}, {"caption_prefix": "x"},
        {"captions_file": tmp_path / "x.csv"}, {"file_column": "x"}, {"caption_column": "x"}, {"missing_caption": "empty"},
        *({"video": {key: value}} for key, value in (
            ("window", "all"), ("windows", 3), ("frame_step", 2), ("repeat_frames", True), ("round_to", 4),
        )),
    ]  # fmt: skip
    for change in changes:
        assert decides(dataset(**change), RULE) != plain, change
    assert decides(dataset(crop_seed=9), RULE) == plain
    assert decides(dataset(crop="random", crop_seed=9), RULE) != decides(dataset(crop="random"), RULE)
    assert decides(dataset(), FrameRule(8, 1)) != plain


def test_a_shape_is_written_with_its_frames() -> None:
    assert str(placed(clip(), dataset()).shape) == str(ClipShape(17, 352, 640)) == "640x352@17"


def test_a_last_frame_that_is_shown_longer_changes_no_rate() -> None:
    source = Probe("h264", 640, 360, 1.0, 33, 35 / 16, 32 / 16)
    assert source.rate < 15.1
    assert placed(source, dataset(frames=33, fps=None)).fps == 16
    assert placed(source, dataset(frames=33)).shape.frames == 33
