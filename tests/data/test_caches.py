"""Filling and reading the caches; what is encoded again, and what is not."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading

import pytest
import torch

from vtrain.contract import Caption, DataError, Filling
from vtrain.data.caching.caches import DROPPED, Caches, fill_caches
from vtrain.data.decoding.decode import decode, unit_range
from vtrain.data.sample import Sample
from vtrain.data.scanning.ledger import ContentHashes
from vtrain.data.scanning.scan import scan


def fill(setup, *datasets, extra=(), **train):
    """Scan and fill as a run does."""
    plan = setup.plan(*datasets, **train)
    return fill_caches(plan, scan(plan).samples, extra, "cpu", lambda _: None)


def standings(setup) -> list[tuple[int, int, int, int, int]]:
    """Of the stage of video: done, total, unusable, unread, made."""
    told, plan = list[Filling](), setup.plan()
    fill_caches(plan, scan(plan).samples, (), "cpu", told.append)
    return [(now.done, now.total, now.unusable, now.unread, now.made) for now in told if now.stage == "video"]


def test_what_cannot_be_used_is_counted_apart_from_what_is_cached(three, undecodable) -> None:
    three.add("bad.mp4", undecodable, "bad")
    told = standings(three)
    assert told[0] == (0, 4, 0, 4, 0)
    assert told[-1] == (3, 4, 1, 0, 3)


def test_a_touched_file_is_to_be_read_and_is_not_made_anew(three) -> None:
    fill(three)
    os.utime(three.folder / "1.mp4", ns=(1, 1))
    clips = three.family.clips
    assert standings(three) == [(2, 3, 0, 1, 0), (3, 3, 0, 0, 0)]
    assert three.family.clips == clips


def trained_on(filled) -> list[Sample]:
    """The samples in the index, as the ledger tells of them."""
    ids = {filled.index.id(number) for number in range(len(filled.index))}
    return [sample for sample in scan(filled.caches._stores.plan).samples if sample.id in ids]


def encodes(setup, *datasets, **train) -> tuple[int, int]:
    """How many captions and clips a run encodes."""
    texts, clips = len(setup.family.encoded_texts), setup.family.clips
    fill(setup, *datasets, **train)
    return len(setup.family.encoded_texts) - texts, setup.family.clips - clips


def entries(setup, kind: str):
    return sorted((setup.cache / kind).rglob("*.safetensors"))


def test_latents_are_the_codecs_own_of_the_decoded_pixels(setup, clips) -> None:
    filled = fill(setup, setup.dataset(folder=clips, sizes=[(160, 96)], fps=10.0, frames=9))
    assert len(trained_on(filled)) == 7
    sample = trained_on(filled)[2]
    mean = filled.caches.latents(sample, sample.starts[0]).mean
    assert mean.shape == (1, 3, 3, 12, 20)
    assert mean.dtype == torch.float32
    with (clips / sample.ref_id).open("rb") as stream:
        pixels = unit_range(decode(stream, sample, sample.starts[0]))[None]
    assert torch.equal(mean, torch.nn.functional.avg_pool3d(pixels[:, :, ::4], (1, 8, 8)))


def test_text_holds_only_real_tokens_in_the_encoders_type(three) -> None:
    filled = fill(three, extra=[(Caption("blurry"), "negative")])
    text = filled.caches.text(Caption("caption number 1"), "prompt")
    assert text["text"].shape == (4, 6)
    assert text["text"].dtype == torch.bfloat16
    assert filled.caches.text(Caption("blurry"), "negative")["text"].shape == (2, 6)
    assert filled.caches.text(DROPPED, "dropped")["text"].shape == (1, 6)
    assert not (text["text"] == 7.0).any()


def test_text_is_encoded_first_and_each_model_is_freed_before_the_next(three) -> None:
    fill(three)
    assert three.family.opened == ["text", "text closed", "video", "video closed"]


def test_a_warm_start_opens_no_model_and_no_file(three) -> None:
    fill(three)
    three.family.opened.clear()
    dataset = three.dataset()
    filled = fill(three, dataset)
    assert three.family.opened == []
    assert dataset.backend.opened == []
    assert len(trained_on(filled)) == 3


def test_without_dropout_no_dropped_caption_is_encoded(three) -> None:
    fill(three, caption_dropout=0.0)
    assert sorted(three.family.encoded_texts) == [(f"caption number {k}", "prompt") for k in range(3)]


def test_equal_captions_are_encoded_once(three) -> None:
    for k in range(3):
        (three.folder / f"{k}.txt").write_text("the same")
    assert encodes(three, caption_dropout=0.0) == (1, 3)


def test_a_changed_caption_encodes_that_caption_only(three) -> None:
    fill(three)
    (three.folder / "1.txt").write_text("new words")
    assert encodes(three) == (1, 0)
    assert three.family.encoded_texts[-1] == ("new words", "prompt")


def test_a_changed_clip_encodes_that_clip_only(three, make_video) -> None:
    fill(three)
    (three.folder / "1.mp4").write_bytes(make_video(frames=30, fps=24))
    assert encodes(three) == (0, 1)


def test_a_touched_clip_is_read_but_not_encoded(three) -> None:
    fill(three)
    os.utime(three.folder / "1.mp4")
    dataset = three.dataset()
    assert encodes(three, dataset) == (0, 0)
    assert dataset.backend.opened == ["1.mp4", "1.mp4"]  # its header, then its bytes
    assert "video" not in three.family.opened[4:]


def test_a_renamed_or_moved_dataset_encodes_nothing(three) -> None:
    fill(three)
    moved = three.root / "moved"
    shutil.copytree(three.folder, moved)
    assert encodes(three, three.dataset(name="other", folder=moved)) == (0, 0)


def test_another_crop_encodes_the_clips_of_which_it_takes_another_part(three) -> None:
    """The first of the three has its bucket's aspect: nothing of it is cut either way."""
    fill(three)
    assert encodes(three, three.dataset(crop="none")) == (0, 2)
    assert encodes(three, three.dataset(crop="none")) == (0, 0)


def test_another_rate_bucket_window_or_length_encodes_every_clip(three) -> None:
    fill(three)
    for change in (
        {"fps": 15.0}, {"sizes": [(64, 32)]}, {"frames": 13}, {"video": {"window": "center"}, "frames": 9},
    ):  # fmt: skip
        assert encodes(three, three.dataset(**change)) == (0, 3), change
        assert encodes(three, three.dataset(**change)) == (0, 0), change
    assert encodes(three) == (0, 0)  # and the first ones are still there


def test_a_new_bucket_encodes_only_the_clips_that_move_to_it(three, make_video) -> None:
    three.add("tall.mp4", make_video(size=(80, 160)), "tall")
    one = [(80, 40)]
    fill(three, three.dataset(sizes=one))
    assert encodes(three, three.dataset(sizes=[*one, (64, 128)])) == (0, 1)


def test_repeats_and_min_frames_encode_nothing(three) -> None:
    fill(three)
    assert encodes(three, three.dataset(repeats=5, min_frames=9)) == (0, 0)


def test_another_text_encoder_encodes_text_only_and_another_codec_video_only(three) -> None:
    weights = three.root / "codec.safetensors"
    weights.write_bytes(b"one")
    three.family.codec_weights = weights
    fill(three)
    three.family.text_version = "2"
    assert encodes(three) == (4, 0)
    weights.write_bytes(b"two")
    assert encodes(three) == (0, 3)
    weights.write_bytes(b"one")
    assert encodes(three) == (0, 0)


def test_a_lost_ledger_costs_reading_and_no_encoding(three) -> None:
    first = fill(three)
    for file in three.cache.glob("ledger.sqlite*"):
        file.unlink()
    assert encodes(three) == (0, 0)
    again = Caches.open(three.plan())
    assert torch.equal(
        again.latents(trained_on(first)[0], trained_on(first)[0].starts[0]).mean,
        first.caches.latents(trained_on(first)[0], trained_on(first)[0].starts[0]).mean,
    )


def test_another_process_opens_the_caches_without_filling(three) -> None:
    filled = fill(three)
    three.family.opened.clear()
    other = Caches.open(three.plan())
    for sample in trained_on(filled):
        assert torch.equal(
            other.latents(sample, sample.starts[0]).mean, filled.caches.latents(sample, sample.starts[0]).mean
        )
        assert torch.equal(
            other.text(sample.captions[0], "prompt")["text"],
            filled.caches.text(sample.captions[0], "prompt")["text"],
        )
    assert three.family.opened == []


def test_clips_of_one_shape_are_encoded_together_up_to_the_batch(setup, make_video) -> None:
    for k in range(5):
        setup.add(f"wide{k}.mp4", make_video(frames=18 + k, fps=16))
    for k in range(2):
        setup.add(f"tall{k}.mp4", make_video(frames=18 + k, fps=16, size=(64, 128)))
    dataset = setup.dataset(sizes=[(128, 64), (64, 128)])
    filled = fill(setup, dataset, video_batch=2)
    counts = sorted((shape[0], shape[3:]) for shape in setup.family.encoded_batches)
    assert counts == [(1, (64, 128)), (2, (64, 128)), (2, (64, 128)), (2, (128, 64))]
    alone = [filled.caches.latents(sample, sample.starts[0]).mean for sample in trained_on(filled)]
    shutil.rmtree(setup.cache)
    single = fill(setup, dataset, video_batch=1)
    assert all(
        torch.equal(a, single.caches.latents(s, s.starts[0]).mean)
        for a, s in zip(alone, trained_on(single), strict=True)
    )


def test_decoding_goes_on_while_the_codec_encodes(three) -> None:
    """While the first clip is being encoded, the second one's file is opened by another thread."""
    dataset = three.dataset()
    plan = three.plan(dataset)
    samples = list(scan(plan).samples)
    dataset.backend.opened.clear()
    second = threading.Event()
    opened = dataset.backend.open

    def open_and_tell(ref):
        if ref.id == "1.mp4":
            assert threading.current_thread() is not threading.main_thread()
            second.set()
        return opened(ref)

    dataset.backend.open = open_and_tell
    three.family.on_encode = lambda: second.wait(20) or pytest.fail("nothing was decoded during the encoding")
    fill_caches(plan, samples, [], "cpu", lambda *_: None)
    assert three.family.clips == 3


def test_an_interrupt_leaves_whole_entries_and_they_are_kept(three) -> None:
    def interrupt():
        if three.family.clips == 2:
            raise KeyboardInterrupt

    three.family.on_encode = interrupt
    with pytest.raises(KeyboardInterrupt):
        fill(three)
    assert len(entries(three, "video")) == 2
    three.family.on_encode = None
    assert encodes(three) == (0, 1)
    assert [p for p in three.cache.rglob("*") if p.suffix == ".part"] == []


def test_a_clip_that_does_not_decode_is_left_out_with_its_reason_now_and_at_the_next_start(
    three, make_video, undecodable
) -> None:
    three.add("bad.mp4", undecodable, "bad")
    filled = fill(three)
    assert [sample.ref_id for sample in trained_on(filled)] == ["0.mp4", "1.mp4", "2.mp4"]
    (reason,) = filled.skipped.values()
    assert list(filled.skipped) == ["clips/bad.mp4"]
    assert "of 17 frames could be decoded" in reason
    again = scan(three.plan()).survey.datasets[0].skipped
    assert again == {reason: (1, "bad.mp4")}
    three.add("bad.mp4", make_video(frames=48), "bad")  # mended
    assert len(trained_on(fill(three))) == 4


def test_a_clip_that_does_not_decode_stops_the_run_if_asked(three, undecodable) -> None:
    three.add("bad.mp4", undecodable, "bad")
    with pytest.raises(DataError, match=r"bad\.mp4: .*of 17 frames could be decoded"):
        fill(three, three.dataset(on_bad_file="stop"))


def test_a_clip_that_vanishes_after_the_scan_is_left_out_but_not_for_ever(three) -> None:
    plan = three.plan()
    samples = list(scan(plan).samples)
    kept = (three.folder / "1.mp4").read_bytes()
    (three.folder / "1.mp4").unlink()
    filled = fill_caches(plan, samples, [], "cpu", lambda *_: None)
    assert filled.skipped == {"clips/1.mp4": "cannot be opened: No such file or directory"}
    (three.folder / "1.mp4").write_bytes(kept)
    assert len(trained_on(fill(three))) == 3


def test_no_clip_that_decodes_is_an_error_with_the_reasons(setup, undecodable) -> None:
    setup.add("bad.mp4", undecodable)
    with pytest.raises(DataError, match=r"clips/bad\.mp4: "):
        fill(setup)


def test_a_full_disk_is_told_as_one_and_leaves_no_half_entry(three, monkeypatch) -> None:
    """Simulated where the bytes are forced to the disk; SQLite does its own."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="the disk is full"):
            fill(three)
    assert [path for path in three.cache.rglob("*") if path.suffix in (".part", ".safetensors")] == []
    assert encodes(three) == (4, 3)


def test_latents_that_are_not_finite_never_reach_the_cache(three) -> None:
    three.family.spoil = float("nan")
    with pytest.raises(DataError, match="encodes to numbers that are not finite"):
        fill(three)
    assert entries(three, "video") == []
    three.family.spoil = 0.0
    assert encodes(three) == (0, 3)  # the clips are not blamed for it


def test_progress_is_told_for_each_stage_up_to_its_total(three) -> None:
    seen: list[tuple[str, int, int]] = []
    plan = three.plan()
    fill_caches(plan, scan(plan).samples, [], "cpu", lambda now: seen.append((now.stage, now.done, now.total)))
    assert [s for s in seen if s[0] == "text"] == [("text", 0, 4), ("text", 1, 4), ("text", 4, 4)]
    assert [s for s in seen if s[0] == "video"] == [("video", n, 3) for n in range(4)]


def test_an_entry_that_was_never_made_is_an_error_that_says_what_to_do(three) -> None:
    plan = three.plan()
    samples = list(scan(plan).samples)
    caches = Caches.open(plan)
    with pytest.raises(DataError, match="was not encoded"):
        caches.latents(samples[0], samples[0].starts[0])
    with pytest.raises(DataError, match="it will be encoded"):
        caches.text(samples[0].captions[0], "prompt")


def test_the_ledger_learns_content_hashes_as_files_are_read(three) -> None:
    filled = fill(three)
    hashes = ContentHashes(three.cache)
    for sample in trained_on(filled):
        expected = hashlib.sha256((three.folder / sample.ref_id).read_bytes()).hexdigest()
        assert hashes.of(str(three.folder), sample.ref) == expected


def test_the_dataset_folder_is_not_written_to(three) -> None:
    before = sorted((p.name, p.stat().st_mtime_ns) for p in [three.folder, *three.folder.iterdir()])
    fill(three)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in [three.folder, *three.folder.iterdir()]) == before
