"""Trackers in their thread: whatever one does, the others get everything and the run gets to know of it once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from vtrain.cli import trackers as chapter
from vtrain.cli.trackers import Trackers
from vtrain.contract import Options, Registered, RunInfo, TrackerSpec
from vtrain.train.loop import Logged, Validated
from vtrain.train.metrics import Row

INFO = RunInfo("run", "/out", {}, 0)
ROW = Row(1, 0.1, 2.0, 2.0, 1e-3, None, [0.5], ["a"], 0.1, 0.0, 1)


class Notes:
    """A tracker that notes what it is given, and calls `at` with the name of each call first."""

    def __init__(self, at: Callable[[str], None] = lambda call: None) -> None:
        self.at, self.calls = at, list[str]()

    def _note(self, call: str) -> None:
        self.at(call)
        self.calls.append(call)

    def start(self, run: RunInfo) -> None:
        self._note("start")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._note(f"scalars {step}")

    def videos(self, step: int, files: Mapping[str, Path]) -> None:
        self._note(f"videos {step}")

    def finish(self) -> None:
        self._note("finish")


def registered(name: str) -> Registered:
    return Registered(TrackerSpec(name, "for tests", Options, lambda options: Notes()), name, f"vtrain-{name}", "1.0")


def follow(*trackers: Notes) -> list[str]:
    """Pass a run's events to trackers; what was warned of."""
    warned: list[str] = []
    named = [(registered(f"t{number}"), tracker) for number, tracker in enumerate(trackers)]
    with Trackers(named, INFO, warned.append) as running:
        running.show(Logged((ROW,)))
        running.show(Validated(1, {}, None))
    return warned


ALL = ["start", "scalars 1", "videos 1", "finish"]


def test_a_tracker_gets_everything_in_order_in_a_thread_that_is_not_the_runs() -> None:
    threads: set[str] = set()
    tracker = Notes(lambda call: threads.add(threading.current_thread().name))
    assert follow(tracker) == []
    assert tracker.calls == ALL
    assert threads == {"trackers"}


def leave(call: str) -> None:
    sys.exit(1)


def fail(call: str) -> None:
    if call.startswith("scalars"):
        raise ConnectionError("no route to host")


@pytest.mark.parametrize(
    ("at", "words"),
    [(fail, "ConnectionError: no route to host"), (leave, "SystemExit: 1")],
    ids=["fails", "ends its thread"],
)
def test_a_tracker_that_fails_is_named_once_with_its_reason_and_the_others_get_everything(
    at: Callable[[str], None], words: str
) -> None:
    bad, good = Notes(at), Notes()
    warned = follow(bad, good)
    assert warned == [f"tracker t0 (vtrain-t0 1.0) failed and is left out from here on: {words}"]
    assert good.calls == ALL


def test_a_tracker_that_hangs_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter, "PATIENCE", 0.2)
    go = threading.Event()
    warned = follow(Notes(lambda call: assert_waits(go)))
    go.set()
    assert len(warned) == 1
    assert "did not finish" in warned[0]


def assert_waits(go: threading.Event) -> None:
    assert go.wait(20)
