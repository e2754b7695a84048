"""Options, durations, sizes and paths: what a key may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from vtrain.contract import (
    Duration,
    FrameRule,
    LocalPath,
    ModelSource,
    Options,
    Size,
    fixed,
    free,
    is_location,
    resume_rule,
)


class Places(Options):
    """Paths."""

    here: LocalPath = fixed(description="a folder")
    model: ModelSource = Field("owner/name", description="a model")
    note: str = free("", description="a note")


class Inner(Options):
    """A table in a table."""

    folder: LocalPath | None = Field(None, description="a folder")


class Kinds(Options):
    """Fields that say where something is, and fields that do not."""

    maybe: LocalPath | None = Field(None, description="a file or none")
    several: dict[str, LocalPath] = Field({}, description="files by name")
    listed: tuple[ModelSource, ...] = Field((), description="models")
    text: str = Field("/a/b", description="a text that looks like a path")
    inner: Inner = Field(Inner(), description="has a path of its own")


def test_a_type_that_says_where_something_is_is_told_wherever_it_stands() -> None:
    assert [name for name in Places.model_fields if is_location(Places, name)] == ["here", "model"]
    assert [name for name in Kinds.model_fields if is_location(Kinds, name)] == ["maybe", "several", "listed"]


def test_an_option_without_a_description_is_refused_when_its_class_is_defined() -> None:
    with pytest.raises(TypeError, match="no description for bare"):

        class Bare(Options):
            bare: int = 3
            told: int = Field(3, description="told")


def test_options_are_frozen_and_forbid_unknown_keys() -> None:
    places = Places(here=Path("x"))
    with pytest.raises(ValidationError, match="frozen"):
        places.here = Path("y")  # type: ignore[misc]
    with pytest.raises(ValidationError, match="unknown"):
        Places.model_validate({"here": "x", "unknown": 1})


@pytest.mark.parametrize("value", ["1", 1.5, True, float("nan")])
def test_a_number_is_not_read_from_anything_else(value: object) -> None:
    class Counted(Options):
        count: int = Field(description="a count")

    with pytest.raises(ValidationError):
        Counted.model_validate({"count": value})


def test_a_fixed_option_refuses_a_change_at_a_resume_a_plain_one_tells_it_and_a_free_one_does_not() -> None:
    assert resume_rule(Places, "here") == "refuse"
    assert resume_rule(Places, "model") == "tell"
    assert resume_rule(Places, "note") == "free"


@pytest.mark.parametrize("rule", ["apply", "Refuse", None, ["refuse"]])
def test_a_resume_rule_that_is_none_is_refused_when_its_class_is_defined(rule: object) -> None:
    with pytest.raises(TypeError, match=r"Odd\.count: no such resume rule; there are free, tell, refuse"):

        class Odd(Options):
            count: int = Field(3, description="a count", json_schema_extra={"resume": rule})  # type: ignore[dict-item]


def test_a_relative_path_starts_at_the_folder_of_the_context(tmp_path: Path) -> None:
    places = Places.model_validate({"here": "sub/x"}, context={"folder": tmp_path})
    assert places.here == tmp_path / "sub" / "x"
    assert Places.model_validate({"here": "/x"}, context={"folder": tmp_path}).here == Path("/x")
    assert Places.model_validate({"here": "~/x"}).here == Path.home() / "x"


@pytest.mark.parametrize("value", ["", 3, None])
def test_a_path_that_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(ValidationError, match="a path is a text that is not empty"):
        Places.model_validate({"here": value})


def test_a_path_is_told_without_dots_unless_a_link_makes_it_another_place(tmp_path: Path) -> None:
    def read(value: str) -> Path:
        return Places.model_validate({"here": value}, context={"folder": tmp_path / "a" / ".." / "b"}).here

    (tmp_path / "b").mkdir()
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "b" / "link").symlink_to(tmp_path / "far" / "away")
    assert read("x") == tmp_path / "b" / "x"
    assert read("../c/./x") == tmp_path / "c" / "x"
    assert read("link/../x").resolve() == tmp_path / "far" / "x", "not beside the link"


def test_a_model_is_a_hub_id_unless_such_a_folder_exists(tmp_path: Path) -> None:
    def read(value: str) -> str:
        return Places.model_validate({"here": "x", "model": value}, context={"folder": tmp_path}).model

    assert read("someone/something") == "someone/something"
    assert read("folder") == str(tmp_path / "folder")
    assert read("./some/thing") == str(tmp_path / "some" / "thing")
    (tmp_path / "someone" / "something").mkdir(parents=True)
    assert read("someone/something") == str(tmp_path / "someone" / "something")


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("500 steps", 500, "steps"),
        ("1 step", 1, "steps"),
        ("1.5 epochs", 1.5, "epochs"),
        ("90 s", 90, "seconds"),
        ("10 min", 600, "seconds"),
        ("1.5h", 5400, "seconds"),
    ],
)
def test_a_duration_is_read_and_written(text: str, value: float, unit: str) -> None:
    duration = Duration.parse(text)
    assert (duration.value, duration.unit) == (value, unit)
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(
    "text", ["500", "", "steps", "-1 steps", "0 steps", "1.5 steps", "5 weeks", "1e3 steps", 500, None]
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"duration|steps"):
        Duration.parse(text)


@given(st.floats(1e-9, 1e12), st.sampled_from(["epochs", "seconds"]))
def test_any_fraction_of_a_duration_survives_being_written(value: float, unit: Literal["epochs", "seconds"]) -> None:
    duration = Duration(value, unit)
    assert Duration.parse(str(duration)).value == pytest.approx(value, rel=1e-12)


@given(st.integers(1, 10**9), st.sampled_from(["steps", "epochs", "s", "min", "h"]))
def test_any_whole_duration_survives_being_written(count: int, unit: str) -> None:
    duration = Duration.parse(f"{count} {unit}")
    assert Duration.parse(str(duration)) == duration


def test_a_size_is_written_width_first_and_reversed_sizes_differ() -> None:
    assert Size.parse("832x480") == Size(width=832, height=480)
    assert Size.parse("480x832") != Size.parse("832x480")
    assert str(Size(832, 480)) == "832x480"


@pytest.mark.parametrize("text", ["832", "0x8", "8x", "axb", "8*8", 480, None, [8, 8], "-8x8"])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="width x height"):
        Size.parse(text)


@given(st.integers(0, 500), st.integers(1, 9), st.integers(0, 9))
def test_the_floor_of_a_frame_rule_is_the_largest_count_it_accepts(frames: int, stride: int, offset: int) -> None:
    rule = FrameRule(stride, offset)
    accepted = [count for count in range(1, frames + 1) if rule.accepts(count)]
    assert rule.floor(frames) == max(accepted, default=0)
