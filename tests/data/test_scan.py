"""The scan: every file used, or skipped with its reason."""

import os
import subprocess
import sys

import pytest

from vtrain.contract import ClipShape, DataError
from vtrain.data.scanning.decisions import settings_key
from vtrain.data.scanning.ledger import Ledger
from vtrain.data.scanning.scan import scan


def skipped(setup, **table) -> dict[str, tuple[int, str]]:
    return dict(scan(setup.plan(setup.dataset(**table))).survey.datasets[0].skipped)


def reason_of(setup, data: bytes, **table) -> str:
    """Why a file is skipped, beside one that is used."""
    setup.add("bad.mp4", data)
    (reason,) = skipped(setup, **table)
    return reason


@pytest.fixture
def good(setup, make_video):
    setup.add("good.mp4", make_video(frames=27, fps=24))
    return setup


def test_the_real_clips_are_all_used_at_ten_frames_per_second(setup, clips) -> None:
    sizes = [(160, 96), (128, 96)]
    found = scan(setup.plan(setup.dataset(folder=clips, sizes=sizes, frames=9, fps=10)))
    assert [sample.id for sample in found.samples] == [
        f"clips/{name}.mp4" for name in ("box_00", "bunny_00", "bunny_01", "city_00", "earth_00", "tree_00", "vtest_00")
    ]
    (survey,) = found.survey.datasets
    assert survey.files == 8
    assert survey.samples == {ClipShape(9, 96, 128): 3, ClipShape(9, 96, 160): 4}
    assert survey.skipped == {"not a video: .md": (1, "README.md")}
    assert found.survey.texts == 7
    assert next(iter(found.samples)).captions[0].text.startswith("A hand tilts a yellow decorated tea box")
    assert found.messages == ()


def test_a_scan_imports_no_torch(setup, clips) -> None:
    code = (
        "import sys, vtrain.data.scanning.scan, vtrain_builtin.folder; print([m for m in sys.modules if m == 'torch'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bad_files_are_left_out_each_with_its_reason(good, make_video, audio_only) -> None:
    video = make_video()
    good.add("zero.mp4", b"")
    good.add("sound.mp4", audio_only)
    good.add("text.mp4", b"these are words\n" * 100)
    good.add("cut.mp4", video[: len(video) // 2])  # its index is at the end
    good.add("paper.pdf", b"%PDF", caption=None)
    good.add("noname", b"x", caption=None)
    good.add(".hidden.mp4", b"x", caption=None)
    good.add(".trash/deleted.mp4", b"x", caption=None)
    found = scan(good.plan())
    assert [sample.ref_id for sample in found.samples] == ["good.mp4"]
    (survey,) = found.survey.datasets
    assert survey.files == 7
    refused, ffmpeg = "cannot be read as a video", "(ffmpeg: Invalid data found when processing input)"
    half = "the file ends before its index (moov): an unfinished download or recording?"
    assert survey.skipped == {
        f"{refused}: {half} {ffmpeg}": (1, "cut.mp4"),
        f"{refused}: it is a text {ffmpeg}": (1, "text.mp4"),
        "is empty (0 bytes)": (1, "zero.mp4"),
        "holds no video, only sound": (1, "sound.mp4"),
        "not a video: .pdf": (1, "paper.pdf"),
        "not a video: no suffix": (1, "noname"),
    }


def test_pictures_are_called_what_they_are_with_what_to_do(good) -> None:
    for suffix in ("jpg", "png", "webp", "avif", "HEIC"):
        good.add(f"a.{suffix}", b"x", caption=None)
    one = "a single image: set data.images = true to use it as a clip of one frame"
    unread = "an image that is not read ({}): save it as PNG or JPEG, an animated one as MP4 or GIF"
    assert skipped(good) == {
        one: (1, "a.jpg"),
        f"{one} (an animated PNG: of all its frames)": (1, "a.png"),
        f"{one} (an animated WebP is not read: save it as MP4 or GIF)": (1, "a.webp"),
        unread.format("AVIF"): (1, "a.avif"),
        unread.format("HEIC"): (1, "a.HEIC"),
    }


def test_too_short_gives_both_counts_and_remedies_that_work(setup, make_video) -> None:
    setup.add("short.mp4", make_video(frames=81, fps=24))
    with pytest.raises(DataError) as caught:
        scan(setup.plan(setup.dataset(frames=81)))
    assert (
        "54 frames at 16 fps (81 at the file's 24); needs 81: set data.video.min_frames = 53 or data.video.fps = 24"
        in str(caught.value)
    )
    (by_frames,) = scan(setup.plan(setup.dataset(frames=81, min_frames=53))).samples
    assert by_frames.shape.frames == 53
    (by_rate,) = scan(setup.plan(setup.dataset(frames=81, fps=24.0))).samples
    assert by_rate.shape.frames == 81


def test_a_clip_of_too_few_frames_at_any_rate_gets_only_the_remedy_that_works(good, make_video) -> None:
    reason = reason_of(good, make_video(frames=9, fps=24))
    assert reason == "6 frames at 16 fps (9 at the file's 24); needs 17: set data.video.min_frames = 5"


def test_a_slower_source_is_left_out_and_not_shown_with_frames_repeated(good, make_video) -> None:
    reason = reason_of(good, make_video(frames=40, fps=10))
    assert reason.startswith("10 frames per second in the file, fewer than the 16 of data.video.fps")
    assert reason.endswith("set data.video.fps to 10 or less, or data.video.repeat_frames = true")
    assert skipped(good, fps=10.0, frames=9) == {}
    assert skipped(good, video={"repeat_frames": True}) == {}


def test_ntsc_rates_count_as_their_round_neighbours(setup, make_video) -> None:
    setup.add("film.mp4", make_video(frames=30, fps=24000 / 1001))
    (sample,) = scan(setup.plan(setup.dataset(fps=24.0))).samples
    assert sample.shape.frames == 17


def test_a_small_clip_is_left_out_unless_enlarging_is_asked_for(good, make_video) -> None:
    reason = reason_of(good, make_video(size=(96, 64)))
    assert reason == (
        "96x64, of which 96x48 would be used, is smaller than its bucket 128x64: "
        "set data.upscale = true or a smaller data.resolution"
    )
    assert skipped(good, upscale=True) == {}


def test_an_odd_size_fits_its_bucket_and_squeezing_is_checked_by_side(setup, make_video) -> None:
    setup.add("odd.mp4", make_video(size=(150, 66)))
    (sample,) = scan(setup.plan()).samples
    assert sample.box == (9, 0, 132, 66)
    with pytest.raises(DataError, match="150x66 is smaller than its bucket 128x72"):
        scan(setup.plan(setup.dataset(sizes=[(128, 72)], crop="none")))


def test_the_bucket_of_nearest_aspect_is_chosen_and_a_turned_clip_is_upright_first(setup, make_video) -> None:
    setup.add("wide.mp4", make_video(size=(256, 96)))
    setup.add("square.mp4", make_video(size=(128, 128)))
    setup.add("tall.mp4", make_video(size=(256, 96), rotate=90))
    sizes = [(192, 64), (128, 128), (64, 64), (64, 192)]
    shapes = {s.ref_id: str(s.shape.size) for s in scan(setup.plan(setup.dataset(sizes=sizes))).samples}
    assert shapes == {"wide.mp4": "192x64", "square.mp4": "128x128", "tall.mp4": "64x192"}


def test_of_two_sizes_of_one_aspect_the_largest_that_fits_is_taken(setup, make_video) -> None:
    setup.add("a.mp4", make_video(size=(128, 64)))
    setup.add("b.mp4", make_video(size=(256, 128)))
    shapes = {s.ref_id: s.shape.width for s in scan(setup.plan(setup.dataset(sizes=[(64, 32), (192, 96)]))).samples}
    assert shapes == {"a.mp4": 64, "b.mp4": 192}


def test_frames_between_least_and_most_are_cut_to_the_frame_rule(setup, make_video) -> None:
    setup.add("a.mp4", make_video(frames=16, fps=16))
    setup.add("b.mp4", make_video(frames=40, fps=16))
    found = scan(setup.plan(setup.dataset(frames=17, min_frames=9, video={"window": "center"}))).samples
    assert [(s.shape.frames, s.starts) for s in found] == [(13, (1 / 16,)), (17, (11 / 16,))]


def test_captions_are_read_with_and_without_a_byte_order_mark_a_caption_a_line(setup, make_video) -> None:
    setup.add("a.mp4", make_video()).with_suffix(".txt").write_bytes(b"\xef\xbb\xbfein M\xc3\xa4dchen \r\n\n winkt\n")
    setup.add("sub/b.MP4", make_video(), "two")
    found = [[caption.text for caption in sample.captions] for sample in scan(setup.plan()).samples]
    assert found == [["ein Mädchen", "winkt"], ["two"]]


def test_a_caption_that_is_not_utf8_is_left_out_with_the_place(good, make_video) -> None:
    good.add("bad.mp4", make_video()).with_suffix(".txt").write_bytes("ein Mädchen".encode("latin-1"))
    assert skipped(good) == {"its caption file is not UTF-8 (byte 5): save it as UTF-8": (1, "bad.mp4")}


def test_a_missing_or_empty_caption_is_left_out_or_empty_as_asked(good, make_video) -> None:
    good.add("none.mp4", make_video(), caption=None)
    good.add("blank.mp4", make_video(), caption=" \n")
    assert sorted(skipped(good)) == [
        'no caption: .txt file of the same name is missing; add one, or set data.missing_caption = "empty"',
        'no caption: its caption file is empty; add one, or set data.missing_caption = "empty"',
    ]
    samples = scan(good.plan(good.dataset(missing_caption="empty"))).samples
    assert [s.captions[0].text for s in samples] == ["", "a clip", ""]


def test_a_file_name_is_a_caption_if_asked(setup, make_video) -> None:
    setup.add("a_red-ball  rolls_.mp4", make_video(), caption=None)
    (sample,) = scan(setup.plan(setup.dataset(captions="filename"))).samples
    assert sample.captions[0].text == "a red ball rolls"


def test_a_name_that_is_not_utf8_is_left_out_and_can_be_printed(good, make_video) -> None:
    (good.folder / os.fsdecode(b"b\xe4d.mp4")).write_bytes(make_video())
    (found,) = skipped(good).items()
    assert found == ("its name is not UTF-8: rename it", (1, "b\\udce4d.mp4"))


def test_many_different_reasons_of_one_kind_are_counted_together(good, make_video) -> None:
    for frames in range(5, 12):
        good.add(f"{frames:02}.mp4", make_video(frames=frames, fps=16))
    (found,) = skipped(good).items()
    assert found == (
        "too short, such as: 5 frames at 16 fps (5 at the file's 16); needs 17: set data.video.min_frames = 5",
        (7, "05.mp4"),
    )


def test_all_problems_of_all_datasets_are_told_at_once(setup, make_video) -> None:
    empty, short, missing = (setup.root / name for name in ("empty", "short", "missing"))
    empty.mkdir()
    short.mkdir()
    (short / "a.mp4").write_bytes(make_video(frames=3))
    (short / "b.mp4").write_bytes(b"")
    plan = setup.plan(*(setup.dataset(name=f.name, folder=f) for f in (empty, short, missing)))
    with pytest.raises(DataError) as caught:
        scan(plan)
    first, second, third = map(str, caught.value.problems)
    assert first == f"config.toml:20: dataset empty: no file in {empty}."
    assert second.startswith(f"config.toml:20: dataset short: no usable clip in {short}: 1 x 2 frames at 16 fps")
    assert second.endswith("1 x is empty (0 bytes) (such as b.mp4).")
    assert third.startswith(f"config.toml:20: {missing}: the dataset folder does not exist.")


def test_on_bad_file_stop_names_every_bad_file(good) -> None:
    good.add("bad1.mp4", b"")
    good.add("bad2.mp4", b"xx")
    good.add("notes.pdf", b"not bad, only no video", caption=None)
    with pytest.raises(DataError) as caught:
        scan(good.plan(good.dataset(on_bad_file="stop")))
    assert [problem.where for problem in caught.value.problems] == [f"{good.folder}/bad{n}.mp4" for n in (1, 2)]


def test_a_second_scan_opens_nothing_and_a_change_opens_just_that_file(good, make_video) -> None:
    good.add("b.mp4", make_video(), "b")
    good.add("bad.mp4", b"no video")
    first = good.dataset()
    before = scan(good.plan(first))
    names = ["b.mp4", "b.txt", "bad.mp4", "bad.txt", "good.mp4", "good.txt"]
    assert sorted(first.backend.opened) == names

    second = good.dataset()
    assert scan(good.plan(second)) == before
    assert second.backend.opened == []

    (good.folder / "b.txt").write_text("another caption")
    good.add("new.mp4", make_video(), "new")
    (good.folder / "bad.mp4").unlink()
    third = good.dataset()
    after = scan(good.plan(third))
    assert sorted(third.backend.opened) == ["b.txt", "new.mp4", "new.txt"]
    assert [s.captions[0].text for s in after.samples] == ["another caption", "a clip", "new"]
    with Ledger(good.cache) as ledger:
        assert "bad.mp4" not in ledger.sources(str(good.folder))


def test_other_settings_probe_nothing_again_and_have_fates_of_their_own(good) -> None:
    scan(good.plan())
    other = good.dataset(sizes=[(64, 32)], frames=9)
    (sample,) = scan(good.plan(other)).samples
    assert other.backend.opened == []
    assert sample.shape == ClipShape(9, 32, 64)
    with Ledger(good.cache) as ledger:
        assert ledger.file_decisions(settings_key(good.dataset(), good.family))["good.mp4"].shape == "128x64@17"
        assert ledger.file_decisions(settings_key(other, good.family))["good.mp4"].shape == "64x32@9"


def test_progress_counts_every_file_looked_at(good) -> None:
    seen: list[int] = []
    scan(good.plan(), seen.append)
    assert seen == [1, 2]  # the clip and its caption


def test_the_dataset_folder_is_not_written_to(good) -> None:
    before = sorted((p.name, p.stat().st_mtime_ns) for p in [good.folder, *good.folder.iterdir()])
    scan(good.plan())
    assert sorted((p.name, p.stat().st_mtime_ns) for p in [good.folder, *good.folder.iterdir()]) == before


def test_samples_are_slim_and_picklable(good) -> None:
    import pickle

    (sample,) = scan(good.plan()).samples
    data = pickle.dumps(sample)
    assert pickle.loads(data) == sample  # noqa: S301 (our own bytes)
    assert not hasattr(sample, "__dict__")
