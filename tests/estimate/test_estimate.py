"""Counting a run, against counts done by hand."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest

from vtrain.contract import ClipShape, ConfigError
from vtrain.contract.specs import bytes_text
from vtrain.data.scanning.surveys import DatasetSurvey, Survey
from vtrain.estimate import estimate as estimating
from vtrain.estimate.estimate import check_room, make_estimate
from vtrain.estimate.render import as_json, sections
from vtrain.plan.records import Plan

PlanOf = Callable[..., Plan]
SQUARE, WIDE = ClipShape(9, 64, 64), ClipShape(9, 64, 96)


def survey(square: int = 10, wide: int = 6, repeats: int = 0) -> Survey:
    found = DatasetSurvey(
        "clips", square + wide + 3, {SQUARE: square, WIDE: wide}, {"too short": (3, "x.mp4")}, repeats
    )
    return Survey((found,), texts=square + wide)


def test_steps_and_epochs_follow_from_each_other(plan_of: PlanOf) -> None:
    made = make_estimate(plan_of(processes=2, train="steps = 10\nbatch_size = 2\naccumulate = 2"), survey())
    assert (made.samples_per_step, made.steps_per_epoch, made.steps, made.epochs) == (8, 2.0, 10, 5.0)
    by_epochs = make_estimate(plan_of(train="epochs = 1.5"), survey(repeats=1))
    assert (by_epochs.steps_per_epoch, by_epochs.steps) == (32, 48)


def test_the_cache_holds_each_clip_once_whatever_the_repeats(plan_of: PlanOf) -> None:
    plan = plan_of()
    once, thrice = make_estimate(plan, survey()), make_estimate(plan, survey(repeats=2))
    assert once.video_bytes == thrice.video_bytes
    per_clip = {shape: 4 * _product(plan.family.latent_shape(shape)) for shape in (SQUARE, WIDE)}
    assert once.video_bytes == 10 * per_clip[SQUARE] + 6 * per_clip[WIDE]


def test_text_is_counted_at_the_width_length_and_type_of_each_part(plan_of: PlanOf) -> None:
    assert make_estimate(plan_of(), survey()).text_bytes == (16 + 1) * 16 * 24 * 4
    plan = plan_of(model='use = "toy-duo"\ntrain = "full"')
    words, letters, gist = 16 * 24 * 4, 32 * 8 * 2, 12 * 4
    assert make_estimate(plan, survey()).text_bytes == (16 + 1) * (words + letters + gist)


def _product(numbers: tuple[int, ...]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


def test_more_samples_a_step_than_there_are_is_refused_with_the_repeats_that_would_do(plan_of: PlanOf) -> None:
    plan = plan_of(processes=2, train="steps = 10\nbatch_size = 5\naccumulate = 4")
    with pytest.raises(ConfigError) as caught:
        make_estimate(plan, survey())
    assert "batch_size 5 x accumulate 4 x 2 process(es) = 40 samples, and one epoch has 16" in str(caught.value)
    assert "Set data.repeats to at least 2" in str(caught.value)
    assert make_estimate(plan, survey(repeats=2)).samples_per_step == 40


def test_a_bucket_smaller_than_a_batch_is_named(plan_of: PlanOf) -> None:
    with pytest.raises(ConfigError, match=r"bucket 96x64@9 has 1 sample\(s\) in an epoch, fewer than batch_size = 4"):
        make_estimate(plan_of(train="steps = 10\nbatch_size = 4"), survey(square=10, wide=1))


def test_too_little_disk_is_refused_and_what_is_there_already_counts(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(estimating.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    plan = plan_of()
    made = make_estimate(plan, survey())
    with pytest.raises(ConfigError, match=r"the cache and 2 checkpoints need .* more and the disk of") as caught:
        check_room(plan, made)
    assert (
        caught.value.problems[0].remedy
        == "Make room there, or set cache.dir or run.output_dir to a folder on another disk."
    )
    for folder, size in (
        (plan.config.cache.dir / "video", made.video_bytes),
        (plan.config.run.output_dir / "checkpoints", 2 * (made.checkpoint_bytes or 0) - 900),
    ):
        folder.mkdir(parents=True)
        with (folder / "entry").open("wb") as file:
            file.truncate(size)
    check_room(plan, made)


def test_weights_that_go_to_a_disk_need_room_there_which_nothing_there_counts_towards(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of()
    table = plan.config.offload.model_copy(update={"disk": plan.config.path.parent / "away", "group": "block"})
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, offload=table))
    made, usage = make_estimate(plan, survey()), shutil.disk_usage("/")
    weights = 4 * plan.family.parameters
    others = made.video_bytes + 2 * (made.checkpoint_bytes or 0)
    monkeypatch.setattr(estimating.shutil, "disk_usage", lambda path: usage._replace(free=others + weights))
    check_room(plan, made)
    monkeypatch.setattr(estimating.shutil, "disk_usage", lambda path: usage._replace(free=others + weights - 1))
    (plan.config.path.parent / "away").mkdir()
    (plan.config.path.parent / "away" / "left").write_bytes(b"of a run that was killed")
    with pytest.raises(ConfigError, match="the cache, 2 checkpoints and offloaded weights need") as caught:
        check_room(plan, made)
    assert "offload.disk to a folder on another disk." in caught.value.problems[0].remedy


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"lr_schedule": 'use = "cosine"\nwarmup = "10 steps"'}, "lr_schedule.warmup is 10 steps and the run 10"),
        (
            {"validation": 'every = "11 steps"\nprompts = { a = "b" }'},
            "validation.every is 11 steps and the run 10: videos come only at the end",
        ),
        ({}, "no gradient clipping"),
    ],
)
def test_what_is_probably_not_meant_is_pointed_out(plan_of: PlanOf, tables: dict[str, str], words: str) -> None:
    assert any(words in warning for warning in make_estimate(plan_of(**tables), survey()).warnings)


def test_nothing_is_pointed_out_without_cause(plan_of: PlanOf) -> None:
    plan = plan_of(train="steps = 10\ngradient_clip = { max = 1.0 }", lr_schedule='warmup = "9 steps"')
    assert make_estimate(plan, survey()).warnings == ()


def test_the_rendered_plan_says_what_was_counted(plan_of: PlanOf) -> None:
    plan = plan_of(train="steps = 8", validation='every = "4 steps"\nprompts = { a = "b" }')
    made = make_estimate(plan, survey())
    rows = {f"{section.title}/{row[0]}": row[1] for section in sections(plan, survey(), made) for row in section.rows}
    assert rows["run/steps"] == "8 optimizer steps, 0.5 epochs"
    assert rows["data: clips/files"] == "19 scanned, 16 used"
    assert rows["data: clips/skipped: 3"] == "too short  (such as x.mp4)"
    assert rows["buckets/96x64@9"] == "6"
    assert rows["validation/videos"] == "1 every 4 steps and at the end: 2 times"
    assert as_json(plan, survey(), made)["steps"] == 8


def test_one_of_something_is_said_without_an_s(plan_of: PlanOf) -> None:
    plan = plan_of(train="steps = 1\nbatch_size = 1\naccumulate = 1")
    made = make_estimate(plan, survey())
    rows = {f"{section.title}/{row[0]}": row[1] for section in sections(plan, survey(), made) for row in section.rows}
    assert rows["run/steps"].startswith("1 optimizer step, ")
    assert rows["run/a step"] == "1 sample = batch 1 x accumulate 1 x 1 process"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_read_as_a_person_would_write_them(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_weights_thin_an_epoch_out_and_are_counted_as_the_file_says_them(plan_of: PlanOf) -> None:
    more = '[[data]]\nuse = "folder"\npath = "others"\nweight = 0.1\n'
    plan = plan_of(data='use = "folder"\npath = "clips"\nweight = 1.0', more=more)
    assert plan.shares == (1, Fraction(1, 10))
    first, second = (
        DatasetSurvey(name, 10, {SQUARE: 10, WIDE: 5}, {}, repeats, share=share)
        for name, repeats, share in (("clips", 0, plan.shares[0]), ("others", 1, plan.shares[1]))
    )
    both = Survey((first, second), texts=30)
    assert both.buckets() == {SQUARE: 12, WIDE: 6}
    assert both.epoch == 18
    assert make_estimate(plan, both).steps_per_epoch == 18
    uneven = Survey((first, replace(second, samples={SQUARE: 12})), texts=30)
    assert uneven.epoch == pytest.approx(15 + 2.4)
    (rows,) = [
        section.rows for section in sections(plan, both, make_estimate(plan, both)) if section.title == "data: others"
    ]
    assert ("files", "10 scanned, 15 used, 2 passes an epoch, of which an epoch takes 0.1 (data.weight)") in rows


@pytest.mark.parametrize("weight", ["0", "-1.0", "inf", "nan"])
def test_a_weight_that_is_no_positive_number_is_refused(plan_of: PlanOf, weight: str) -> None:
    with pytest.raises(ConfigError, match=r"weight"):
        plan_of(data=f'use = "folder"\npath = "clips"\nweight = {weight}')
