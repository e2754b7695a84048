"""What cached features and masks take, and which models stay in memory, against counts done by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from vtrain.contract import ClipShape, ConfigError
from vtrain.data.scanning.surveys import DatasetSurvey, Survey
from vtrain.estimate import estimate as estimating
from vtrain.estimate.estimate import Estimate, check_room, make_estimate
from vtrain.estimate.render import as_json, sections
from vtrain.plan.records import Plan

PlanOf = Callable[..., Plan]
SQUARE, WIDE = ClipShape(9, 64, 64), ClipShape(9, 64, 96)
FOUND = Survey((DatasetSurvey("clips", 16, {SQUARE: 10, WIDE: 6}, {}, 0),), texts=16)
"""Tokens of a clip: 3 x 4x4 and 3 x 4x6."""

COLOURS = '[[regularizer]]\nuse = "toy-colours"\nblock = 1\n'


def rows(plan: Plan, estimate: Estimate, title: str) -> dict[str, str]:
    (found,) = [section.rows for section in sections(plan, FOUND, estimate) if section.title == title]
    return {row[0]: row[1] for row in found}


@pytest.mark.parametrize(
    ("options", "numbers", "width"),
    [
        ("", 10 * 3 * 16 * 4 + 6 * 3 * 24 * 4, 4),
        ('dtype = "bf16"', 10 * 3 * 16 * 4 + 6 * 3 * 24 * 4, 2),
        ("pool = 2\nchannels = 5", 10 * 3 * 4 * 5 + 6 * 3 * 6 * 5, 4),
    ],
)
def test_cached_features_are_priced_by_shape_width_and_type(
    plan_of: PlanOf, options: str, numbers: int, width: int
) -> None:
    plan = plan_of(more=COLOURS + options)
    made = make_estimate(plan, FOUND)
    assert made.feature_bytes == {"toy-colours": numbers * width}
    assert as_json(plan, FOUND, made)["cache_bytes"]["features"] == {"toy-colours": numbers * width}  # type: ignore[index]


def test_the_plan_says_what_the_largest_clips_features_are(plan_of: PlanOf) -> None:
    plan = plan_of(more=COLOURS + 'dtype = "bf16"')
    words = rows(plan, make_estimate(plan, FOUND), "on disk")["cached features (toy-colours)"]
    assert words == "16 clips, 7.1 KiB: 3 x 6x4 vectors of 4, bf16"


@pytest.mark.parametrize("teacher", ["decoded", "source"])
def test_features_made_at_each_step_take_no_disk(plan_of: PlanOf, teacher: str) -> None:
    plan = plan_of(more=f'{COLOURS}teacher = "{teacher}"')
    made = make_estimate(plan, FOUND)
    assert made.feature_bytes == {}
    assert not any("features" in label for label in rows(plan, made, "on disk"))


def test_a_disk_too_small_for_features_is_refused_and_they_are_named(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(more=COLOURS)
    made = make_estimate(plan, FOUND)
    usage = shutil.disk_usage("/")
    held = made.video_bytes + 3 * (made.checkpoint_bytes or 0)
    words = r"the cache, cached features \(14\.2 KiB of toy-colours\) and 2 checkpoints need .* more and the disk of"
    monkeypatch.setattr(estimating.shutil, "disk_usage", lambda path: usage._replace(free=14_000))
    with pytest.raises(ConfigError, match=words):
        check_room(plan, made)
    monkeypatch.setattr(estimating.shutil, "disk_usage", lambda path: usage._replace(free=held + 15_000))
    check_room(plan, made)


def test_masks_are_priced_at_one_for_each_window_at_most(plan_of: PlanOf) -> None:
    plan = plan_of(data='use = "folder"\npath = "clips"\nmasks = { folder = "masks" }')
    made = make_estimate(plan, FOUND)
    assert made.mask_bytes == 4 * (10 * 3 * 8 * 8 + 6 * 3 * 8 * 12)
    assert rows(plan, made, "on disk")["cached masks"] == "at most 14.2 KiB"
    assert make_estimate(plan_of(), FOUND).mask_bytes == 0


@pytest.mark.parametrize(
    ("teacher", "codec", "encoder"),
    [
        ("cached", "no: latents are cached", "no: its features are cached"),
        (
            "decoded",
            "yes, what decodes alone, where the family can part with the rest: it decodes clips at each step for toy-colours",
            "yes: it runs at each step at which toy-colours is at work, on the frames that the codec decodes",
        ),
        (
            "source",
            "no: latents are cached",
            "yes: it runs at each step at which toy-colours is at work, on the clips' own frames",
        ),
    ],
)
def test_the_plan_says_which_models_stay_in_memory(plan_of: PlanOf, teacher: str, codec: str, encoder: str) -> None:
    plan = plan_of(more=f'{COLOURS}teacher = "{teacher}"')
    found = rows(plan, make_estimate(plan, FOUND), "in memory while training")
    assert found.pop("activations").startswith("the input of each block")
    assert found == {
        "denoiser": f"{plan.family.parameters:,} parameters, fp32",
        "text encoder": "no: captions are cached",
        "video codec": codec,
        "encoder of toy-colours": encoder,
    }


def test_validation_loads_the_codec_and_lets_it_go(plan_of: PlanOf) -> None:
    plan = plan_of(validation='every = "4 steps"\nprompts = { a = "b" }')
    found = rows(plan, make_estimate(plan, FOUND), "in memory while training")
    assert found["video codec"] == "no: latents are cached; it is loaded for each validation"
    decoding = plan_of(validation='every = "4 steps"\nprompts = { a = "b" }', more=f'{COLOURS}teacher = "decoded"')
    found = rows(decoding, make_estimate(decoding, FOUND), "in memory while training")
    assert found["video codec"].endswith("for toy-colours; another is loaded for each validation")
