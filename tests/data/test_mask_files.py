"""Which mask is whose, what becomes of clips whose masks are missing or bad, and that a change of either is noticed."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vtrain.contract import DataError, LatentShape, SourceRef
from vtrain.data.caching.caches import fill_caches
from vtrain.data.sample import Skipped
from vtrain.data.scanning.decisions import settings_key
from vtrain.data.scanning.ledger import ContentHashes, Ledger
from vtrain.data.scanning.quarantine import move_bad
from vtrain.data.scanning.scan import scan
from vtrain.plan.records import MasksPlan
from vtrain_builtin.frames import FRAMES, FramesOptions
from vtrain_builtin.tar import TAR, TarOptions

WHERE = "config.toml:30"


@pytest.fixture
def three(setup, make_video):
    for name in ("a", "sub/b", "c"):
        setup.add(f"{name}.mp4", make_video(), f"clip {name}")
    return setup


def add_picture(setup, name: str, size: tuple[int, int] = (128, 64), grey: int = 255) -> None:
    (setup.folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size[::-1], grey, dtype=np.uint8)).save(setup.folder / name)


def masked(setup, *, folder: str = "masks", invert: bool = False, missing: str = "whole", **table):
    return replace(setup.dataset(**table), masks=MasksPlan(folder, invert, missing, WHERE))


def found_by(setup, **settings):
    return scan(setup.plan(masked(setup, **settings)))


def of(found) -> dict[str, str]:
    """Clip -> its mask."""
    return {sample.ref_id: sample.mask_ref for sample in found.samples}


def skipped(found) -> dict[str, str]:
    """An example -> the reason why it is skipped."""
    return {example: reason for reason, (_, example) in found.survey.datasets[0].skipped.items()}


def test_a_mask_has_its_clips_name_in_a_folder_of_the_dataset(three, make_video) -> None:
    add_picture(three, "extra/masks/a.png")
    three.add("extra/masks/sub/b.mkv", make_video(form="matroska", size=(64, 32)), None)
    found = found_by(three, folder="extra/masks")
    assert of(found) == {"a.mp4": "extra/masks/a.png", "c.mp4": "", "sub/b.mp4": "extra/masks/sub/b.mkv"}
    (survey,) = found.survey.datasets
    assert survey.files == 3
    assert survey.skipped == {}
    assert survey.notes == (
        "2 clips with a mask", "1 clip without a mask is trained on whole (such as c.mp4)",
    )  # fmt: skip


def test_a_sample_carries_what_opens_its_mask_and_its_hash_once_that_is_known(three) -> None:
    add_picture(three, "masks/a.png")
    plan = three.plan(masked(three))
    first = next(iter(scan(plan).samples))
    state = (three.folder / "masks/a.png").stat()
    assert first.mask is not None
    assert (first.mask.ref.id, first.mask.ref.size, first.mask.content) == ("masks/a.png", state.st_size, "")
    assert plan.datasets[0].backend.open(first.mask.ref).read() == (three.folder / "masks/a.png").read_bytes()
    location = str(three.folder)
    with Ledger(three.cache) as ledger:
        ledger.record_hash(location, first.mask.ref, "1234")
    assert next(iter(scan(plan).samples)).mask == replace(first.mask, content="1234")
    assert ContentHashes(three.cache).of(location, first.mask.ref) == "1234"
    assert ContentHashes(three.cache).of(location, SourceRef("masks/a.png", 1, "other")) is None


def test_clips_without_a_mask_may_be_dropped(three) -> None:
    add_picture(three, "masks/a.png")
    found = found_by(three, missing="drop")
    assert of(found) == {"a.mp4": "masks/a.png"}
    assert skipped(found) == {
        "c.mp4": "it has no mask: masks/c with any suffix of an image or a video",
        "sub/b.mp4": "it has no mask: masks/sub/b with any suffix of an image or a video",
    }
    assert found.survey.datasets[0].notes == ("1 clip with a mask",)


def test_bad_masks_leave_their_clips_out_with_the_masks_name(three, make_video) -> None:
    three.add("masks/a.mp4", make_video(frames=9), None)
    three.add("masks/c.mp4", make_video(frames=54), None)
    add_picture(three, "masks/sub/b.png", size=(64, 64))
    three.add("d.mp4", make_video())
    three.add("masks/d.png", b"no picture", None)
    three.add("e.mp4", make_video())
    found = found_by(three)
    same = "make it as long as the clip, or a single image"
    assert of(found) == {"e.mp4": ""}
    reasons = skipped(found)
    assert reasons.pop("d.mp4").startswith("its mask masks/d.png: cannot be read as a video")
    assert reasons == {
        "a.mp4": f"its mask masks/a.mp4 is shorter: 0.375 s of 1.125 s; {same}",
        "c.mp4": f"its mask masks/c.mp4 is longer: 2.250 s of 1.125 s; {same}",
        "sub/b.mp4": "its mask masks/sub/b.png has another aspect: 64x64 for 128x64; a mask shows the whole picture of its "
        "clip, at any size",
    }
    with Ledger(three.cache) as ledger:
        file_decisions = ledger.file_decisions(settings_key(masked(three), three.family))
    assert {file_decision.status for name, file_decision in file_decisions.items() if name != "e.mp4"} == {"failed"}


def test_a_mask_may_be_shorter_or_longer_by_one_frame(three, make_video) -> None:
    three.add("masks/a.mp4", make_video(frames=9, fps=8), None)
    three.add("masks/c.mp4", make_video(frames=26), None)
    three.add("masks/sub/b.mp4", make_video(frames=28), None)
    assert skipped(found_by(three)) == {}


def test_two_masks_of_a_clip_are_one_too_many_until_one_goes(three) -> None:
    add_picture(three, "masks/a.png")
    add_picture(three, "masks/a.bmp")
    found = found_by(three)
    assert skipped(found) == {"a.mp4": "it has two masks, masks/a.bmp and masks/a.png: keep one"}
    (three.folder / "masks/a.png").unlink()
    assert of(found_by(three))["a.mp4"] == "masks/a.bmp"
    add_picture(three, "masks/a.png")
    assert "a.mp4" not in of(found_by(three))


def test_a_mask_that_comes_changes_or_goes_is_noticed(three, make_video) -> None:
    add_picture(three, "masks/a.png")
    assert of(found_by(three)) == {"a.mp4": "masks/a.png", "c.mp4": "", "sub/b.mp4": ""}
    add_picture(three, "masks/c.png", size=(64, 64))
    assert of(found_by(three)) == {"a.mp4": "masks/a.png", "sub/b.mp4": ""}
    add_picture(three, "masks/c.png", size=(32, 16))
    (three.folder / "masks/a.png").unlink()
    assert of(found_by(three)) == {"a.mp4": "", "c.mp4": "masks/c.png", "sub/b.mp4": ""}


def fail(setup, name: str, reason: str) -> None:
    """Write down what filling finds of a clip."""
    plan = setup.plan(masked(setup))
    (sample,) = (sample for sample in scan(plan).samples if sample.ref_id == name)
    with Ledger(setup.cache) as ledger:
        left = Skipped("failed", "decoding", reason)
        ledger.record_skipped(settings_key(plan.datasets[0], plan.family), sample, left)


def test_a_clip_that_failed_for_its_mask_is_tried_again_when_the_mask_changes(three) -> None:
    add_picture(three, "masks/a.png", grey=0)
    fail(three, "a.mp4", "its mask is black")
    assert skipped(found_by(three)) == {"a.mp4": "its mask is black"}
    three.add("d.mp4", (three.folder / "a.mp4").read_bytes())
    assert skipped(found_by(three)) == {"a.mp4": "its mask is black"}
    add_picture(three, "masks/a.png", size=(64, 32))
    assert of(found_by(three))["a.mp4"] == "masks/a.png"
    fail(three, "a.mp4", "its mask is black")
    (three.folder / "masks/a.png").unlink()
    add_picture(three, "masks/c.png")
    assert of(found_by(three))["a.mp4"] == ""


def test_a_clip_whose_mask_was_empty_is_tried_again_with_latents_of_another_grid(three) -> None:
    add_picture(three, "masks/a.png", grey=0)
    fail(three, "a.mp4", "its mask is black")
    assert skipped(found_by(three)) == {"a.mp4": "its mask is black"}
    before, plain = settings_key(masked(three), three.family), settings_key(three.dataset(), three.family)
    three.family.latent_shape = lambda clip: LatentShape(3, (clip.frames - 1) // 4 + 1, clip.height, clip.width)
    assert of(found_by(three))["a.mp4"] == "masks/a.png"
    three.family.pixel_frames = lambda frame: range(4 * frame, 4 * frame + 1)
    assert len({settings_key(masked(three), three.family), before}) == 2
    assert settings_key(three.dataset(), three.family) == plain, "without masks the grid decides over nothing"


def test_a_clip_that_failed_for_its_mask_is_not_lost_to_the_other_inversion(three) -> None:
    add_picture(three, "masks/a.png", grey=0)
    fail(three, "a.mp4", "its mask is black")
    assert of(found_by(three, invert=True))["a.mp4"] == "masks/a.png"
    assert skipped(found_by(three)) == {"a.mp4": "its mask is black"}


def test_inverting_opens_no_file_again(three) -> None:
    add_picture(three, "masks/a.png")
    found_by(three)
    dataset = masked(three, invert=True)
    scan(three.plan(dataset))
    assert dataset.backend.opened == []


def test_masks_that_belong_to_no_clip_and_files_that_are_no_masks_are_told(three) -> None:
    add_picture(three, "masks/a.png")
    add_picture(three, "masks/z.png")
    add_picture(three, "masks/sub/c.png")
    three.add("masks/c.npy", b"numbers", None)
    assert found_by(three).survey.datasets[0].notes == (
        "1 clip with a mask",
        "2 clips without a mask are trained on whole (such as c.mp4)",
        "2 masks without a clip (such as masks/sub/c.png)",
        "1 file in masks/ is no mask (such as masks/c.npy)",
    )


def problem(setup, **settings):
    with pytest.raises(DataError) as caught:
        found_by(setup, **settings)
    (only,) = caught.value.problems
    return only


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_masks_is_an_error_at_its_line(three, there) -> None:
    if there:
        three.add("masks/a.npy", b"numbers", None)
    found = problem(three)
    assert found.where == WHERE
    assert found.what == f"dataset clips: no image and no video in {three.folder}/masks, where its masks should be."
    assert "remove [data.masks]" in found.remedy


def test_masks_of_other_names_than_the_clips_are_an_error_that_says_which_name(three) -> None:
    add_picture(three, "masks/a_mask.png")
    found = problem(three)
    assert found.where == WHERE
    assert found.what == f"dataset clips: no mask in {three.folder}/masks belongs to a clip (such as masks/a_mask.png)."
    assert found.remedy == "The mask of a.mp4 is masks/a with any such suffix."


def test_a_bad_mask_stops_the_run_where_bad_files_do(three) -> None:
    add_picture(three, "masks/a.png", size=(64, 64))
    found = problem(three, on_bad_file="stop")
    assert found.where == f"{three.folder}/a.mp4"
    assert "its mask masks/a.png has another aspect" in found.what


def test_a_mask_that_does_not_decode_stops_filling_where_bad_files_do(three) -> None:
    mask = three.folder / "masks/a.png"
    mask.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128), dtype=np.uint8)).save(mask)
    plan = three.plan(masked(three, on_bad_file="stop"))
    samples = list(scan(plan).samples)
    data = mask.read_bytes()
    mask.write_bytes(data[:-40] + bytes(40))
    with pytest.raises(DataError) as caught:
        fill_caches(plan, samples, [], "cpu", lambda *_: None)
    (only,) = caught.value.problems
    assert only.where == f"{three.folder}/a.mp4"
    assert only.what.startswith("its mask masks/a.png: ")


def test_where_bad_files_are_moved_a_clip_with_a_bad_mask_is_and_its_mask_stays(three, tmp_path) -> None:
    """Without its mask the clip would be trained on whole."""
    add_picture(three, "masks/a.png", size=(64, 64))
    plan = three.plan(masked(three, on_bad_file="move", quarantine=tmp_path / "bad"))
    scan(plan)
    (moved,) = move_bad(plan)
    assert (moved.ref_id, moved.target) == ("a.mp4", tmp_path / "bad/a.mp4")
    assert moved.reason.startswith("its mask masks/a.png has another aspect")
    assert (three.folder / "masks/a.png").exists()


def test_a_clip_whose_mask_may_be_read_at_another_time_is_not_moved(three, tmp_path, monkeypatch) -> None:
    add_picture(three, "masks/a.png")
    dataset = masked(three, on_bad_file="move", quarantine=tmp_path / "bad")
    real = dataset.backend.open

    def failing(ref: SourceRef):
        if ref.id.startswith("masks/"):
            raise OSError(5, "Input/output error")
        return real(ref)

    monkeypatch.setattr(dataset.backend, "open", failing)
    plan = three.plan(dataset)
    assert skipped(scan(plan)) == {"a.mp4": "its mask masks/a.png: cannot be opened: Input/output error"}
    assert list(move_bad(plan)) == []
    monkeypatch.undo()
    assert of(scan(plan))["a.mp4"] == "masks/a.png"


def test_without_masks_the_folder_is_of_clips_like_any_other(three, make_video) -> None:
    three.add("masks/a.mp4", make_video())
    found = scan(three.plan())
    assert [sample.ref_id for sample in found.samples] == ["a.mp4", "c.mp4", "masks/a.mp4", "sub/b.mp4"]
    assert found.survey.datasets[0].notes == ()


def test_masks_of_clips_in_a_shard_lie_in_the_shard_of_that_name(setup, make_video, tmp_path) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.full((32, 64), 255, dtype=np.uint8)).save(picture, "png")
    shards = {"one.tar": {"a.mp4": make_video(), "b.mp4": make_video()}, "masks/one.tar": {"a.png": picture.getvalue()}}
    for shard, members in shards.items():
        (tmp_path / "shards" / shard).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(tmp_path / "shards" / shard, "w") as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    backend = TAR.build(TarOptions(path=str(tmp_path / "shards")))
    found = scan(setup.plan(replace(masked(setup, captions="filename"), backend=backend)))
    assert of(found) == {"one.tar/a.mp4": "masks/one.tar/a.png", "one.tar/b.mp4": ""}


def test_masks_of_folders_of_images_are_folders_of_images(setup, tmp_path) -> None:
    for name, grey in (("clips/a", 200), ("clips/b", 100), ("clips/masks/a", 255)):
        for number in range(17):
            add_picture(setup, f"../{name}/{number:03}.png", grey=grey)
    backend = FRAMES.build(FramesOptions(path=tmp_path / "clips", fps=16))
    found = scan(setup.plan(replace(masked(setup, captions="filename"), backend=backend)))
    assert of(found) == {"a.mov": "masks/a.mov", "b.mov": ""}
