"""Buckets made from a number, over all numbers and strides."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtrain.contract import ClipShape, ConfigError, LatentShape, Size
from vtrain.plan.datasets import ASPECTS, buckets
from vtrain.plan.records import Plan

PlanOf = Callable[..., Plan]


def test_the_buckets_of_480_at_the_stride_of_sana_video() -> None:
    assert [str(size) for size in buckets(480, "pixel_area", 16)] == [
        "672x336", "640x368", "592x400", "560x416", "544x432", "480x480", "432x544", "416x560", "400x592", "368x640",
        "336x672",
    ]  # fmt: skip
    assert [str(size) for size in buckets(480, "pixel", 16)] == [
        "960x480", "848x480", "720x480", "640x480", "608x480", "480x480", "480x608", "480x640", "480x720", "480x848",
        "480x960",
    ]  # fmt: skip


@given(
    number=st.integers(1, 4096),
    stride=st.sampled_from([1, 8, 16, 32, 64]),
    unit=st.sampled_from(["pixel_area", "pixel"]),
)
def test_every_bucket_is_a_multiple_of_the_stride_none_twice_and_each_has_its_turned_one(number, stride, unit) -> None:
    found = buckets(number, unit, stride)
    assert len(found) == len(set(found)) <= len(ASPECTS)
    assert all(size.width >= stride and size.height >= stride for size in found)
    assert all(size.width % stride == 0 and size.height % stride == 0 for size in found)
    assert {Size(size.height, size.width) for size in found} == set(found)


@given(number=st.integers(480, 4096), stride=st.sampled_from([8, 16]))
def test_areas_and_aspects_are_near_what_was_asked_for(number: int, stride: int) -> None:
    found = buckets(number, "pixel_area", stride)
    assert len(found) == len(ASPECTS)
    for size, (width, height) in zip(found, ASPECTS, strict=True):
        assert abs(math.log(size.area / number**2)) < 2.1 * stride / number
        assert abs(math.log(size.aspect * height / width)) < 2.1 * stride / number
    for size, (width, height) in zip(buckets(number, "pixel", stride), ASPECTS, strict=True):
        assert abs(min(size) - number) <= stride / 2
        assert abs(max(size) - min(size) * max(width / height, height / width)) <= stride / 2


def data(rows: str) -> str:
    return f'use = "folder"\npath = "clips"\n{rows}'


def test_a_number_is_the_edge_of_a_square_or_the_shorter_edge(plan_of: PlanOf) -> None:
    stride = plan_of().family.pixel_stride
    assert plan_of(data=data("resolution = 64")).datasets[0].sizes == buckets(64, "pixel_area", stride)
    shorter = plan_of(data=data('resolution = 64\nresolution_type = "pixel"')).datasets[0]
    assert shorter.sizes == buckets(64, "pixel", stride)
    assert min(shorter.sizes[0]) == 64


def test_an_area_far_from_the_familys_own_is_pointed_out_and_theirs_is_offered(plan_of: PlanOf) -> None:
    (warning,) = plan_of(data=data("resolution = 48")).warnings
    assert warning == (
        'resolution = 48 with resolution_type = "pixel_area" is the area of 48x48, 2304 pixels; the family\'s "tiny" is '
        '64x64, 4096 pixels: write resolution = "tiny" if that is meant'
    )
    for fine in (
        "resolution = 64",
        "resolution = 66",
        'resolution = 48\nresolution_type = "pixel"',
        'resolution = "48x48"',
    ):
        assert plan_of(data=data(fine)).warnings == ()


@pytest.mark.parametrize(
    ("resolution", "remedy"),
    [
        ('"480"', "A number stands without quotes: resolution = 480"),
        ('"tinny"', 'Did you mean "tiny"?'),
        ('["64x63"]', 'The nearest is "64x64".'),
    ],
)
def test_a_wrong_resolution_says_what_was_probably_meant(plan_of: PlanOf, resolution: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(data=data(f"resolution = {resolution}"))
    (problem,) = caught.value.problems
    assert problem.where.endswith("config.toml:9")
    assert problem.remedy == remedy


def test_a_number_in_quotes_is_perhaps_a_bucket_set(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    import vtrain_toy.family

    monkeypatch.setattr(vtrain_toy.family.ToyFamily, "resolutions", lambda self: {"64p": (Size(64, 64),)})
    with pytest.raises(ConfigError) as caught:
        plan_of(data=data('resolution = "64"'))
    (problem,) = caught.value.problems
    assert problem.remedy == 'Did you mean "64p"? A number stands without quotes: resolution = 64'


def test_sizes_far_beyond_the_checkpoints_own_are_pointed_out_smaller_ones_are_not(plan_of: PlanOf) -> None:
    large = plan_of(
        data=data('resolution = ["96x64", "128x96", "64x128"]'),
        more='[validation]\nevery = "1 steps"\nsize = "96x128"\nframes = 5\nprompts = { one = "a cat" }',
    )
    largest = 'times the area of 96x64, the largest size of this checkpoint\'s own, "tiny"'
    own = f"{largest}: it has not been trained on videos that large"
    assert [text for text in large.warnings if "times the area" in text] == [
        f"[[data]] clips: 128x96 has 2.0 {own}",
        f"[validation] size: 96x128 has 2.0 {own}",
    ]
    for fine in ('resolution = "16x16"', 'resolution = "tiny"', 'resolution = "96x96"'):
        assert plan_of(data=data(fine)).warnings == ()
    by_edge = plan_of(data=data('resolution = 96\nresolution_type = "pixel"')).warnings
    assert [text.partition(" has ")[0] for text in by_edge] == ["[[data]] clips: 192x96"]
    by_area = plan_of(data=data("resolution = 480")).warnings
    assert len(by_area) == 1, "of a number that is an area the warning above is enough"


def test_a_size_by_the_rules_that_the_family_does_not_take_is_refused_in_its_words(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtrain_toy.family import ToyFamily

    def refuse(self: ToyFamily, clip: ClipShape) -> LatentShape:
        raise ValueError(f"{clip.size} has a row too many")

    monkeypatch.setattr(ToyFamily, "latent_shape", refuse)
    with pytest.raises(ConfigError, match=r"this size: \d+x\d+ has a row too many\. Choose another size"):
        plan_of()
