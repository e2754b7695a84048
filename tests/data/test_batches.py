"""Batches: a pure function of the micro-batch number."""

from collections import Counter
from fractions import Fraction

import pytest
import torch

from vtrain.contract import DataError, PluginError
from vtrain.data.batches import Batches
from vtrain.data.caching.caches import Caches, fill_caches
from vtrain.data.index import build
from vtrain.data.scanning.scan import scan


@pytest.fixture
def seven(setup, clips):
    """The real clips in two shapes, filled; and Batches over them."""
    dataset = {"folder": clips, "sizes": [(160, 96), (128, 96)], "fps": 10.0, "frames": 9}
    plan = setup.plan(setup.dataset(**dataset))
    filled = fill_caches(plan, scan(plan).samples, [], "cpu", lambda *_: None)

    def batches(seed=1, repeats=0, **train):
        plan = setup.plan(setup.dataset(**dataset, repeats=repeats), seed=seed, **train)
        return Batches(plan, Caches.open(plan), filled.index)

    batches.samples = list(scan(plan).samples)
    return batches


def same(a, b) -> bool:
    fields = ("micro_batch", "draws", "sample_ids", "dropped")
    tensors = [
        (a.latents.mean, b.latents.mean),
        (a.text.only.embeds, b.text.only.embeds),
        (a.text.only.mask, b.text.only.mask),
    ]
    return all(getattr(a, f) == getattr(b, f) for f in fields) and all(torch.equal(x, y) for x, y in tensors)


def test_a_batch_holds_the_latents_and_text_of_its_samples(seven) -> None:
    batches = seven(batch_size=2, caption_dropout=0.0)
    caches = batches._caches
    by_id = {sample.id: sample for sample in seven.samples}
    for m in range(8):
        batch = batches[m]
        assert batch.micro_batch == m
        assert batch.latents.mean.dtype == torch.float32
        wide = batch.text.only.embeds.shape[1]
        assert batch.text.only.mask.sum(dim=1).max() > wide - 8, "padded to the longest, in eights"
        for row, name in enumerate(batch.sample_ids):
            assert torch.equal(
                batch.latents.mean[row : row + 1], caches.latents(by_id[name], by_id[name].starts[0]).mean
            )
            text = caches.text(by_id[name].captions[0], "prompt")["text"]
            length = len(text)
            assert torch.equal(batch.text.only.embeds[row, :length], text)
            assert not batch.text.only.embeds[row, length:].any()
            assert batch.text.only.mask[row].tolist() == [True] * length + [False] * (wide - length)


def test_an_entry_that_is_missing_names_the_samples_that_it_was_read_for(seven) -> None:
    """Its own name is a hash, which says nothing."""
    batches = seven(batch_size=2, caption_dropout=0.0)
    ids = batches[0].sample_ids
    for entry in batches._caches._stores.video.files():
        entry.unlink()
    with pytest.raises(
        DataError, match=rf"cannot be read: .* It was read for {ids[0]}, {ids[1]}\. Start the run again"
    ):
        batches[0]


def test_every_sample_comes_once_per_epoch_and_once_more_per_repeat(seven) -> None:
    batches = seven(repeats=2, caption_dropout=0.0)
    assert batches.micro_batches(1) == 21
    for epoch in range(2):
        names = Counter(batches[m].sample_ids[0] for m in range(epoch * 21, epoch * 21 + 21))
        assert names == {sample.id: 3 for sample in seven.samples}


def test_batch_size_accumulation_and_processes_change_no_draw(seven) -> None:
    """The draw number, its sample and its caption dropout are one table, whatever the batch size."""

    def table(size, count):
        batches = seven(batch_size=size, caption_dropout=0.5)
        rows = [batches[m] for m in range(count)]
        return {d: (i, p) for b in rows for d, i, p in zip(b.draws, b.sample_ids, b.dropped, strict=True)}

    one = table(1, 42)
    for size in (2, 3):
        assert table(size, 42 // size).items() <= one.items() | table(1, 60).items()


def test_batches_are_the_same_in_any_order_and_from_fresh_objects(seven) -> None:
    first = seven(batch_size=2)
    forward = [first[m] for m in range(12)]
    second = seven(batch_size=2)
    assert all(same(second[m], forward[m]) for m in (11, 3, 0, 7, 3, 10))


def test_another_seed_is_another_order(seven) -> None:
    one, two = ([seven(seed=s)[m].sample_ids for m in range(14)] for s in (1, 2))
    assert one != two


def test_shapes_are_never_mixed(seven) -> None:
    batches = seven(batch_size=3)
    shapes = {sample.id: sample.shape for sample in seven.samples}
    seen = set()
    for m in range(14):
        (shape,) = {shapes[name] for name in batches[m].sample_ids}
        seen.add(shape)
    assert len(seen) == 2


def test_dropped_captions_are_the_dropped_role_and_as_many_as_asked(seven) -> None:
    batches = seven(caption_dropout=0.3)
    drawn = [batches[m] for m in range(700)]
    share = sum(batch.dropped[0] for batch in drawn) / 700
    assert abs(share - 0.3) < 0.06  # standard error 0.017
    dropped = next(batch for batch in drawn if batch.dropped[0])
    assert dropped.text.only.mask.sum() == 1
    assert not any(seven(caption_dropout=0.0)[m].dropped[0] for m in range(70))
    assert all(seven(caption_dropout=1.0)[m].dropped[0] for m in range(70))


def test_epochs_are_counted_over_all_shapes(seven) -> None:
    batches = seven(batch_size=2)
    assert batches.micro_batches(2) == 7  # 8 of one shape and 6 of the other
    assert batches.epoch_of(6) <= 2.0 < batches.epoch_of(7)


def test_no_sample_is_an_error() -> None:
    with pytest.raises(DataError, match="no sample"):
        Batches(None, None, build((), None, None))


def test_text_longer_than_the_family_takes_is_an_error_and_is_not_cut(seven) -> None:
    batches = seven(batch_size=2, caption_dropout=0.0)
    text = batches._caches._stores.text
    for entry in text.files():
        text.write(entry.stem, {"embeds": torch.zeros(41, 6, dtype=torch.bfloat16)})
    with pytest.raises(PluginError, match=r'encoder "words": the part "text" is \(1, 41, 6\) where \(1, 1 to 40, 6\)'):
        batches[0]


def test_weights_say_how_often_datasets_are_drawn_relative_to_each_other(setup, make_video) -> None:
    for name in ("rare", "common"):
        for k in range(4):
            setup.add(f"../{name}/{k}.mp4", make_video(frames=27 + k))

    def batches(**weights):
        datasets = [
            setup.dataset(name, setup.root / name, weight=weights.get(name, 1.0)) for name in ("rare", "common")
        ]
        plan = setup.plan(*datasets, caption_dropout=0.0)
        found = scan(plan)
        filled = fill_caches(plan, found.samples, [], "cpu", lambda *_: None)
        return Batches(plan, filled.caches, filled.index), found.survey

    made, survey = batches(rare=2.0, common=0.5)
    assert survey.epoch == 5
    assert [dataset.share for dataset in survey.datasets] == [1, Fraction(1, 4)]
    four = [made[m].sample_ids[0] for m in range(20)]
    assert made.micro_batches(4) == 20
    assert Counter(four) == {f"{name}/{k}.mp4": n for name, n in (("rare", 4), ("common", 1)) for k in range(4)}
    alike, survey = batches(rare=3.0, common=3.0)
    plain, _ = batches()
    assert survey.epoch == 8
    assert [alike[m].sample_ids for m in range(16)] == [plain[m].sample_ids for m in range(16)]
