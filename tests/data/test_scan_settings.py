"""The settings of time, space and captions, from files to what is decoded and encoded."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import av
import numpy as np
import pytest

from vtrain.contract import Caption, CaptionExtra, ClipShape, DataError, Words
from vtrain.data.caching.caches import fill_caches
from vtrain.data.decoding.decode import decode
from vtrain.data.scanning.files import look
from vtrain.data.scanning.misfits import Misfits
from vtrain.data.scanning.scan import scan
from vtrain.plan.records import MasksPlan
from vtrain_builtin.folder import LocalFolder


def samples(setup, **table) -> list:
    return list(scan(setup.plan(setup.dataset(**table))).samples)


def survey(setup, **table):
    return scan(setup.plan(setup.dataset(**table))).survey.datasets[0]


def fill(setup, dataset) -> int:
    """Clips encoded now."""
    plan, before = setup.plan(dataset), setup.family.clips
    filled = fill_caches(plan, list(scan(plan).samples), [], "cpu", lambda *_: None)
    assert not filled.skipped
    return setup.family.clips - before


def greys(setup, sample, start: float) -> list[int]:
    """The number that each decoded frame shows (`conftest.picture`)."""
    with (setup.folder / sample.ref_id).open("rb") as stream:
        pixels = decode(stream, sample, start)
    middle = pixels[:, :, pixels.shape[2] // 2, pixels.shape[3] // 2].float().mean(0)
    return [round((float(value) - 20) / 5) for value in middle]


@pytest.mark.parametrize(("form", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9")])
@pytest.mark.parametrize("rate", [8, 24000 / 1001, 25, 30000 / 1001, 60])
def test_at_the_clips_own_rate_every_frame_is_decoded_once(setup, make_video, rate, form, codec) -> None:
    setup.add("a.mkv", make_video(frames=33, fps=rate, form=form, codec=codec))
    (sample,) = samples(setup, frames=33, fps=None)
    assert greys(setup, sample, 0.0) == list(range(33))


def test_every_nth_frame_after_resampling_is_decoded(setup, make_video) -> None:
    setup.add("a.mp4", make_video(frames=40, fps=24))
    (sample,) = samples(setup, frames=5, fps=None, video={"frame_step": 4, "window": "center"})
    assert sample.fps == 6
    assert greys(setup, sample, sample.starts[0]) == [8, 12, 16, 20, 24]
    (sample,) = samples(setup, frames=9, fps=12.0, video={"frame_step": 2})
    assert greys(setup, sample, 0.0) == list(range(0, 36, 4))


def test_a_variable_rate_at_its_own_mean_is_resampled_by_timestamps(setup, make_video) -> None:
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4]
    setup.add("a.mkv", make_video(frames=10, form="matroska", times=times))
    (sample,) = samples(setup, frames=9, fps=None)
    assert sample.fps == pytest.approx(10 / 1.6, rel=0.15)
    shown = greys(setup, sample, 0.0)
    assert shown == sorted(shown)
    assert all(times[frame] <= k / sample.fps + 0.002 for k, frame in enumerate(shown))


def test_all_windows_of_a_long_clip_are_samples_of_their_own(setup, make_video) -> None:
    setup.add("long.mp4", make_video(frames=40, fps=16))
    setup.add("short.mp4", make_video(frames=17, fps=16))
    found = samples(setup, video={"window": "all"})
    assert [sample.id for sample in found] == ["clips/long.mp4#1", "clips/long.mp4#2", "clips/short.mp4"]
    assert [sample.starts for sample in found] == [(0.0,), (17 / 16,), (0.0,)]
    assert greys(setup, found[1], 17 / 16) == list(range(17, 34))
    seen = survey(setup, video={"window": "all"})
    assert (list(seen.samples.values()), list(seen.clips.values()), list(seen.windows.values())) == ([3], [2], [3])


def test_a_random_window_is_one_of_a_set_that_is_cached_once(setup, make_video) -> None:
    setup.add("a.mp4", make_video(frames=40, fps=16))
    dataset = setup.dataset(video={"window": "random", "windows": 3})
    (sample,) = scan(setup.plan(dataset)).samples
    assert sample.starts == (0.0, 12 / 16, 23 / 16)
    assert fill(setup, dataset) == 3
    assert fill(setup, dataset) == 0
    assert fill(setup, setup.dataset(video={"window": "random", "windows": 2})) == 0  # both ends are in both sets
    assert fill(setup, setup.dataset(video={"window": "start"})) == 0
    seen = survey(setup, video={"window": "random", "windows": 3})
    assert (list(seen.samples.values()), list(seen.windows.values())) == ([1], [3])


def test_a_clip_longer_than_max_frames_gives_samples_of_its_pieces(setup, make_video) -> None:
    setup.add("a.mp4", make_video(frames=60, fps=16))
    found = scan(setup.plan(replace(setup.dataset(), max_frames=30))).samples
    assert [sample.starts for sample in found] == [(0.0,), (30 / 16,)]


def test_a_random_crop_stays_where_it_is_until_the_seed_changes(setup, make_video) -> None:
    for name in ("a", "b"):
        setup.add(f"{name}.mp4", make_video(size=(256, 64)))
    dataset = replace(setup.dataset(crop="random", sizes=[(64, 64)]), crop_seed=7)
    places = [sample.box.left for sample in scan(setup.plan(dataset)).samples]
    assert len(set(places)) == 2
    assert fill(setup, dataset) == 2
    assert fill(setup, dataset) == 0
    assert fill(setup, replace(dataset, crop_seed=8)) == 2


def test_the_pixels_of_a_reduced_clip_are_resampled_once_from_its_own(setup, make_video) -> None:
    setup.add("a.mp4", make_video(size=(512, 256)))
    (sample,) = samples(setup, resolution_type="pixel", max_size=128, downsample_to=128)
    assert sample.box == (128, 64, 256, 128)  # of 256x128, the 128x64 at the centre
    with (setup.folder / "a.mp4").open("rb") as stream:
        pixels = decode(stream, sample, 0.0)
    with av.open(str(setup.folder / "a.mp4")) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")[64:192, 128:384].astype(np.float64)
    halved = frame.reshape(64, 2, 128, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    # A bilinear antialiased halving weighs 4 by 4 pixels: flat areas are equal, edges lie near.
    assert np.abs(pixels[:, 0].numpy() - halved).mean() < 1


@pytest.mark.parametrize(("crop", "of_a", "of_c"), [("none", 0.25, 3.0), ("center", 0.2, 0.75)])
def test_a_survey_says_what_the_pictures_of_a_bucket_lose_and_counts_those_that_lose_much(
    setup, make_video, crop: str, of_a: float, of_c: float
) -> None:
    for name, size in (("a", (160, 64)), ("b", (128, 64)), ("c", (128, 256)), ("d", (128, 256))):
        setup.add(f"{name}.mp4", make_video(size=size))
    found = survey(setup, crop=crop)
    ((shape, loss),) = found.losses.items()
    mean = (of_a + 2 * of_c) / 4
    cropped = (loss.cropped, loss.cropped_mean)
    stretched = (loss.stretch - 1, loss.stretch_mean - 1)
    assert shape == ClipShape(17, 64, 128)
    assert (cropped if crop == "center" else stretched) == pytest.approx((of_c, mean))
    assert (stretched if crop == "center" else cropped) == (0, 0)
    assert loss.worst in ("c.mp4", "d.mp4")
    assert found.misfits == Misfits(2, (("c.mp4", pytest.approx(of_c)), ("d.mp4", pytest.approx(of_c))), ((0.5, 2),))
    again = survey(setup, crop=crop)
    assert (again.losses, again.misfits) == (found.losses, found.misfits), "as the ledger kept it"


def test_pictures_of_their_buckets_aspect_lose_nothing(setup, make_video) -> None:
    setup.add("a.mp4", make_video(size=(256, 128)))
    for crop in ("none", "center"):
        found = survey(setup, crop=crop)
        assert (found.losses, found.misfits) == ({}, Misfits())


def beside(setup, name: str, data: object) -> None:
    (setup.folder / name).write_text(data if isinstance(data, str) else json.dumps(data))


def texts(setup, **table) -> dict[str, list[Caption]]:
    return {sample.ref_id: list(sample.captions) for sample in samples(setup, **table)}


def test_text_files_of_several_lines_are_pointed_out_until_somebody_says_what_a_file_is(setup, make_video) -> None:
    prose = "A woman in a red coat walks along the pier while\nthe sun sets behind the harbour."
    for name, text in (("a", "a cat\na dog"), ("b", prose), ("c", prose), ("d", '{\n"caption": "a cat"\n}')):
        setup.add(f"{name}.mp4", make_video(), caption=text)
    assert [text.text for text in texts(setup)["d.mp4"]] == ["{", '"caption": "a cat"', "}"]
    json_files, prose_files = survey(setup).doubts
    assert json_files.startswith("1 caption file holds JSON (such as d.txt): rename to .json and set data.captions =")
    assert prose_files.startswith("2 caption files look like one text over several lines (such as b.txt), ")
    assert 'set data.caption_per = "file"' in prose_files
    assert look(setup.plan()).notes("clips") == (json_files, prose_files)
    for said in ("line", "file"):
        assert survey(setup, caption_per=said).doubts == ()
    whole = texts(setup, caption_per="file")
    assert whole["b.mp4"] == [Caption(prose.replace("\n", " "))]
    assert whole["a.mp4"] == [Caption("a cat a dog")]
    # Two datasets of one place, each with its own rule.
    plan = setup.plan(setup.dataset("lines", caption_per="line"), setup.dataset("files", caption_per="file"))
    assert [len(sample.captions) for sample in scan(plan).samples] == [1, 1, 1, 1, 2, 2, 2, 3]


def test_sidecars_give_captions_and_motion_scores(setup, make_video) -> None:
    for name in ("a", "b", "c", "d"):
        setup.add(f"{name}.mp4", make_video(), caption="not this")
    beside(setup, "a.json", {"caption": "one", "motion_score": 12})
    beside(setup, "b.JSON", {"captions": ["two", "three"]})
    beside(setup, "c.json", {"caption": 5})
    assert texts(setup, captions="json", caption_prefix="film: ") == {
        "a.mp4": [Caption("film: one", {"motion_score": 12})],
        "b.mp4": [Caption("film: two"), Caption("film: three")],
    }
    assert survey(setup, captions="json").skipped == {
        "caption in its caption file is a number: write a text": (1, "c.mp4"),
        'no caption: .json file of the same name is missing; add one, or set data.missing_caption = "empty"': (
            1,
            "d.mp4",
        ),
    }
    beside(setup, "c.json", {"caption": "mended"})
    assert texts(setup, captions="json")["c.mp4"] == [Caption("mended")]
    assert texts(setup)["a.mp4"] == [Caption("not this")]


def test_keys_of_sidecars_that_nobody_reads_are_told_once_with_an_example(setup, make_video) -> None:
    for name in ("a", "b"):
        setup.add(f"{name}.mp4", make_video(), caption=None)
    beside(setup, "a.json", {"caption": "one", "fps": 16, "motion_scroe": 3, "tags": ["x", {"\ud800": float("nan")}]})
    beside(setup, "b.json", {"caption": "two", "fps": float("inf"), "motion_score": 4, "note": None})
    beside(setup, "orphan.json", {"caption": "three", "of nobody": 1})
    assert len(texts(setup, captions="json")) == 2
    (doubt,) = survey(setup, captions="json").doubts
    assert doubt == (
        'keys of caption files that nobody reads: "fps" (2, such as a.json), "motion_scroe" (1, such as a.json; did you mean '
        '"motion_score"?), "tags" (1, such as a.json); if that is meant, set data.ignore_extras = ["fps", "motion_scroe", "tags"]'
    )
    ignoring = ["fps", "motion_scroe", "tags"]
    assert survey(setup, captions="json", ignore_extras=ignoring).doubts == ()
    assert survey(setup, missing_caption="empty").doubts == (), "sidecars are not read"
    beside(setup, "c.json", {"caption": "x", **{f"key {number}": 1 for number in range(9)}})
    setup.add("c.mp4", make_video(), caption=None)
    (doubt,) = survey(setup, captions="json", ignore_extras=ignoring).doubts
    assert '"key 4" (1, such as c.json) and 4 more;' in doubt


def test_a_key_that_another_family_reads_is_an_error_with_file_and_line(setup, make_video) -> None:
    setup.add("a.mp4", make_video(), caption=None)
    beside(setup, "a.json", '{\n "caption": "one",\n "camera" : "still"\n}')
    dataset = replace(setup.dataset(captions="json"), foreign_extras={"camera": "other"})
    with pytest.raises(DataError) as caught:
        scan(setup.plan(dataset))
    (problem,) = caught.value.problems
    assert problem.where == f"{setup.folder}/a.json:3"
    assert problem.what == (
        'this model family does not read "camera" (other does: an extra of another model family); 1 caption file has it.'
    )
    assert problem.remedy == 'Remove the key, or set data.ignore_extras = ["camera"] to train without it.'
    assert len(scan(setup.plan(replace(dataset, foreign_extras={}))).samples) == 1


def test_another_family_reads_other_extras_of_the_same_sidecars(setup, make_video) -> None:
    setup.add("a.mp4", make_video(), caption=None)
    beside(setup, "a.json", {"caption": "one", "motion_score": 5, "pace": "fast"})
    dataset = setup.dataset(captions="json")
    read = {
        (): {},
        (CaptionExtra("pace", "text", "x"),): {"pace": "fast"},
        (*dataset.extras,): {"motion_score": 5},
    }
    for extras, found in read.items():
        (sample,) = scan(setup.plan(replace(dataset, extras=extras))).samples
        assert sample.captions == (Caption("one", found),)
    (sample,) = scan(setup.plan(setup.dataset(captions="json", ignore_extras=["motion_score"]))).samples
    assert sample.captions == (Caption("one", {"motion_score": 5}),), (
        "the plan leaves ignored ones out of the dataset's"
    )
    bad = replace(dataset, extras=(CaptionExtra("pace", "int", "x"),))
    with pytest.raises(DataError, match="its pace 'fast' is no whole number"):
        scan(setup.plan(bad))


def test_a_motion_score_makes_another_text_entry_and_encodes_no_video(setup, make_video) -> None:
    setup.add("a.mp4", make_video())
    beside(setup, "a.json", {"caption": "one"})
    dataset = setup.dataset(captions="json")
    assert fill(setup, dataset) == 1
    setup.family.encoded_texts.clear()
    beside(setup, "a.json", {"caption": "one", "motion_score": 12})
    assert fill(setup, dataset) == 0
    assert setup.family.encoded_texts == [("one", "prompt")]
    beside(setup, "a.json", '{"motion_score": 12.0, "caption": "one", "seen": true}')
    assert fill(setup, dataset) == 0
    assert len(setup.family.encoded_texts) == 1


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_captions_in_one_file_with_rows_and_clips_that_lack_the_other_told(setup, make_video, tmp_path, form) -> None:
    for name in ("a.mp4", "sub/b.mp4", "c.mp4", "d.mp4"):
        setup.add(name, make_video(), caption="not this")
    rows = [
        ("sub/b.mp4", "two", 3),
        ("gone.mp4", "x", 1),
        ("a.mp4", "one", 1),
        ("sub/b.mp4", "more", 3),
        ("a.txt", "y", 1),
    ]
    rows += [("d.mp4", "fast", -1)]
    file = tmp_path / f"captions.{form}"
    if form == "csv":
        file.write_text("file,caption,motion_score\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an extra")
        columns = dict(zip(("file", "caption", "motion_score"), map(list, zip(*rows, strict=True)), strict=True))
        parquet.write_table(pyarrow.table(columns), file)
    table = {"captions": form, "captions_file": file}
    assert texts(setup, **table) == {
        "a.mp4": [Caption("one", {"motion_score": 1})],
        "sub/b.mp4": [Caption("two", {"motion_score": 3}), Caption("more", {"motion_score": 3})],
    }
    seen = survey(setup, **table)
    bad = f"its motion score '-1' in captions.{form}:{7 if form == 'csv' else 6} is no whole number from 0 on: write one such as 30"
    assert {reason.split(";")[0]: found for reason, found in seen.skipped.items()} == {
        f"no caption: captions.{form} has no row for it": (1, "c.mp4"),
        bad: (1, "d.mp4"),
    }
    assert seen.notes == ("2 captions without a clip (such as a.txt)",)


def test_a_row_that_changes_is_noticed_though_no_clip_did(setup, make_video, tmp_path) -> None:
    setup.add("a.mp4", make_video(), caption=None)
    file = tmp_path / "captions.csv"
    file.write_text("file,caption\na.mp4,one\n")
    assert texts(setup, captions="csv", captions_file=file) == {"a.mp4": [Caption("one")]}
    file.write_text("file,caption\na.mp4,two\n")
    assert texts(setup, captions="csv", captions_file=file) == {"a.mp4": [Caption("two")]}
    file.write_text("file,caption\nb.mp4,two\n")
    assert survey(setup, captions="csv", captions_file=file, missing_caption="empty").notes == (
        "1 caption without a clip (such as b.mp4)",
    )


def test_one_caption_for_all_opens_no_caption_file(setup, make_video) -> None:
    for name in ("a.mp4", "b.mp4"):
        setup.add(name, make_video(), caption="not this")
    dataset = setup.dataset(captions="instance_prompt", caption="a film")
    found = list(scan(setup.plan(dataset)).samples)
    assert [sample.captions for sample in found] == [(Caption("a film"),)] * 2
    assert not [name for name in dataset.backend.opened if name.endswith(".txt")]


def test_captions_of_the_backend_are_the_default_where_it_has_them(setup, make_video) -> None:
    class Knowing(LocalFolder):
        def captions(self, extras: Sequence[str] = ()) -> Iterator[tuple[str, Words]]:
            assert extras == ("motion_score",)
            yield "a.mp4", Words(("told", "twice"), {"motion_score": 4})

    setup.add("a.mp4", make_video(), caption="beside")
    dataset = replace(setup.dataset(), backend=Knowing(str(setup.folder)))
    (sample,) = scan(setup.plan(dataset)).samples
    assert sample.captions == (Caption("told", {"motion_score": 4}), Caption("twice", {"motion_score": 4}))
    (sample,) = scan(setup.plan(replace(dataset, table=setup.dataset(captions="textfile").table))).samples
    assert sample.captions == (Caption("beside"),)


def test_a_stream_can_be_read_as_a_sample_at_any_start(setup, make_video) -> None:
    setup.add("a.mp4", make_video(frames=80, fps=16))
    (sample,) = samples(setup, video={"window": "random", "windows": 5})
    data = io.BytesIO((setup.folder / "a.mp4").read_bytes())
    for start in sample.starts:
        data.seek(0)
        first = round(start * 16)
        pixels = decode(data, sample, start)
        middle = pixels[:, :, 32, 64].float().mean(0)
        shown = [round((float(value) - 20) / 5) for value in middle]
        assert shown == [k % 40 for k in range(first, first + 17)]


def test_caption_files_without_a_clip_are_counted(setup, make_video) -> None:
    for name in ("a", "b"):
        setup.add(f"{name}.mp4", make_video(), "words")
    for name in ("orphan.txt", "sub/b.txt", "masks/a.txt", "README.txt", "sub/readme.txt", "other.json", "notes.md"):
        setup.add(name, b"{}", None)
    assert scan(setup.plan()).survey.datasets[0].notes == ("3 captions without a clip (such as masks/a.txt)",)
    masked = replace(setup.dataset(), masks=MasksPlan("masks"))
    (setup.folder / "masks/a.png").write_bytes(b"no picture")
    assert "2 captions without a clip (such as orphan.txt)" in scan(setup.plan(masked)).survey.datasets[0].notes
    sidecars = setup.dataset(captions="json", missing_caption="empty")
    assert scan(setup.plan(sidecars)).survey.datasets[0].notes == ("1 caption without a clip (such as other.json)",)
    assert scan(setup.plan(setup.dataset(captions="filename"))).survey.datasets[0].notes == ()
    for name in ("orphan.txt", "sub/b.txt", "masks/a.txt", "masks/a.png"):
        (setup.folder / name).unlink()
    assert scan(setup.plan()).survey.datasets[0].notes == ()
    (setup.folder / "a.mp4").unlink()
    assert scan(setup.plan()).survey.datasets[0].notes == ("1 caption without a clip (such as a.txt)",)
