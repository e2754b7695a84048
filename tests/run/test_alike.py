"""Processes that train together have one configuration, the same packages, and folders that all of them see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vtrain.contract import ConfigError
from vtrain.run import alike
from vtrain.run.alike import check_alike


class Two:
    """This process, and another that is as `other` makes of it. rank: of this one; sees: whether the other sees the folders."""

    count = 2

    def __init__(self, other: Callable[[Any], Any] = lambda facts: facts, rank: int = 0, sees: bool = True) -> None:
        self.other, self.rank, self.first, self.sees = other, rank, rank == 0, sees

    def gathered(self, values: list[Any]) -> list[Any]:
        (own,) = values
        if isinstance(own, tuple):
            return [own, (1, [] if self.sees else [str(folder) for folder in self.folders])]
        return [own, self.other(own)]

    def from_first(self, make: Callable[[], Any]) -> Any:
        made = make()
        if isinstance(made, list):
            self.folders = made
        return made


def test_alike_processes_leave_nothing_behind(plan_of: Any, tmp_path: Path) -> None:
    plan = plan_of()
    check_alike(plan, Two())  # type: ignore[arg-type]
    assert not list(plan.config.run.output_dir.iterdir())


def test_one_process_is_asked_nothing(plan_of: Any) -> None:
    class One:
        count = 1

    check_alike(plan_of(), One())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            lambda facts: replace(facts, host="b", configuration="0"),
            r"process 2 of 2 \(on b\) has another text in this file than process 1 of 2 \(on ",
        ),
        (
            lambda facts: replace(facts, packages={**facts.packages, "torch": "torch 1.0"}),
            r"process 2 of 2 .* has torch 1\.0 where process 1 of 2 .* has torch 2\.",
        ),
    ],
)
def test_what_one_process_has_otherwise_is_named_with_it(plan_of: Any, other: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        check_alike(plan_of(), Two(other))  # type: ignore[arg-type]
    assert len(caught.value.problems) == 1


def test_a_folder_that_another_machine_does_not_see_is_found_before_the_first_step(plan_of: Any) -> None:
    with pytest.raises(ConfigError, match="does not see what process 1 of 2") as caught:
        check_alike(plan_of(), Two(sees=False))  # type: ignore[arg-type]
    assert len(caught.value.problems) == 2


def test_another_machine_that_has_other_files_is_named_with_them(
    plan_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and sizes, not times: copies on each machine's own disk are as good as one folder."""
    plan = plan_of()
    clips = Path(plan.datasets[0].backend.location)
    clips.mkdir(exist_ok=True)
    (clips / "a.mp4").write_bytes(b"1")

    def elsewhere(facts: Any) -> Any:
        assert facts.files is not None
        return replace(facts, host="b", files={"clips": change(facts.files["clips"])})

    for name, value in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    change: Callable[[str], str] = str
    check_alike(plan, Two(elsewhere))  # type: ignore[arg-type]
    change = "{} and others".format
    with pytest.raises(
        ConfigError,
        match=r"process 2 of 2 \(on b\) has in .*: 1 file .* and others; process 1 of 2 \(on .*\) has: 1 file",
    ):
        check_alike(plan, Two(elsewhere))  # type: ignore[arg-type]
    clips.rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"does not exist.* and others; process 1"):
        check_alike(plan, Two(elsewhere))  # type: ignore[arg-type]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_alike(plan, Two(lambda facts: replace(facts, host=str(facts.files))))  # type: ignore[arg-type]


def test_what_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "PATIENCE", 0.3)
    asked: list[float] = []
    monkeypatch.setattr(alike.time, "sleep", lambda seconds: (asked.append(seconds), (tmp_path / "late").touch()))
    assert alike._seen(tmp_path / "late")
    assert asked == [0.1]
    monkeypatch.undo()
    monkeypatch.setattr(alike, "PATIENCE", 0.0)
    assert not alike._seen(tmp_path / "never")
