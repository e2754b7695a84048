"""Listeners in their threads: whatever one does, the others get everything and the run gets to know of it."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vtrain.contract import CheckpointError, Event, Logged, Noted, RunInfo, StepMetrics, Stepped, Validated
from vtrain.run import listeners as chapter
from vtrain.run.listeners import Listeners, saved_states

INFO = RunInfo("run", "/out", {}, 0)
LOGGED = Logged((StepMetrics(1, 0.1, 2.0, 2.0, 1e-3, None, [0.5], ["a"], 0.1, 0.0, 1),))


class Notes:
    """A tracker that notes what it is given, and calls `at` with the name of each call first."""

    events: tuple[type[Event], ...] = (Logged, Validated)

    def __init__(self, at: Callable[[str], None] = lambda call: None) -> None:
        self.at, self.calls, self.saved = at, list[str](), dict[str, Any]()

    def _note(self, call: str) -> None:
        self.at(call)
        self.calls.append(call)

    def start(self, run: RunInfo, saved: Mapping[str, Any]) -> None:
        self.saved = dict(saved)
        self._note("start")

    def show(self, event: Event) -> None:
        self._note(type(event).__name__)

    def state(self) -> Mapping[str, Any]:
        return {"calls": list(self.calls)}

    def finish(self) -> None:
        self._note("finish")


def built(*trackers: Notes) -> list[tuple[str, str, Callable[[], Notes]]]:
    return [(f"k{number}", f"t{number}", lambda it=tracker: it) for number, tracker in enumerate(trackers)]


def follow(*trackers: Notes, events: tuple[Event, ...] = (Stepped(1), LOGGED, Validated(1, {}, None))) -> list[str]:
    """Show a run's events to trackers; what was warned of."""
    listeners = Listeners(built(*trackers), INFO, {"k0": {"id": 7}})
    for event in events:
        listeners.show(event)
    listeners.finish()
    return list(listeners.warnings())


ALL = ["start", "Logged", "Validated", "finish"]


def test_a_tracker_gets_what_it_asks_for_in_order_in_a_thread_of_its_own() -> None:
    threads: set[str] = set()
    one, other = (Notes(lambda call: threads.add(threading.current_thread().name)) for _ in range(2))
    assert follow(one, other) == []
    assert one.calls == other.calls == ALL
    assert threads == {"listener t0", "listener t1"}


def test_what_a_tracker_wants_kept_is_given_to_it_again() -> None:
    one, other = Notes(), Notes()
    listeners = Listeners(built(one, other), INFO, {"k0": {"id": 7}})
    listeners.show(LOGGED)
    listeners.finish()
    assert (one.saved, other.saved) == ({"id": 7}, {})
    assert listeners.states() == {"k0": {"calls": ["start", "Logged"]}, "k1": {"calls": ["start", "Logged"]}}


def leave(call: str) -> None:
    sys.exit(1)


def fail(call: str) -> None:
    if call == "Logged":
        raise ConnectionError("no route to host")


@pytest.mark.parametrize(
    ("at", "words"),
    [
        (fail, r"ConnectionError: no route to host \(in show\(Logged\), .*\.py:\d+\)"),
        (leave, r"SystemExit: 1 \(in start, .*\)"),
    ],
    ids=["fails", "ends its thread"],
)
def test_a_tracker_that_fails_is_named_once_with_its_reason_and_the_others_get_everything(
    at: Callable[[str], None], words: str
) -> None:
    bad, good = Notes(at), Notes()
    (warned,) = follow(bad, good)
    assert re.fullmatch(f"t0 failed and is off for the rest of the run: {words}", warned), warned
    assert good.calls == ALL


def test_a_state_that_is_no_json_is_the_trackers_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Notes()
    monkeypatch.setattr(bad, "state", lambda: {"socket": object()})
    (warned,) = follow(bad)
    assert "t0 failed and is off for the rest of the run: TypeError" in warned
    assert "(in state" in warned


def test_a_tracker_that_hangs_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter, "PATIENCE_S", 0.2)
    go = threading.Event()
    good = Notes()
    warned = follow(Notes(lambda call: assert_waits(go)), good)
    go.set()
    assert warned == ["t0 did not finish within 0.2 seconds (it is in start); its last numbers may be missing"]
    assert good.calls == ALL


def test_one_that_hangs_with_a_full_queue_costs_no_other_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter, "PATIENCE_S", 0.3)
    monkeypatch.setattr(chapter, "ROOM", 2)
    go = threading.Event()
    good = Notes()
    warned = follow(Notes(lambda call: assert_waits(go)), good, events=(LOGGED,) * 2 + (Stepped(1),) * 9)
    go.set()
    assert good.calls == ["start", "Logged", "Logged", "finish"]
    assert warned == ["t0 did not finish within 0.3 seconds (it is in start); its last numbers may be missing"]


@pytest.mark.parametrize("fault", ["build", "events"])
def test_a_tracker_that_cannot_be_built_or_asks_for_no_events_is_warned_of(fault: str) -> None:
    good, odd = Notes(), Notes()
    odd.events = ("Logged",)  # type: ignore[assignment]

    def build() -> Notes:
        if fault == "build":
            raise ModuleNotFoundError("no wandb")
        return odd

    listeners = Listeners([("k0", "t0", build), *built(good)], INFO, {})
    listeners.show(LOGGED)
    listeners.finish()
    assert good.calls == ["start", "Logged", "finish"]
    (warned,) = listeners.warnings()
    assert warned.startswith("t0 could not be built and is off: ")


def test_a_tracker_that_is_too_slow_misses_events_which_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter, "ROOM", 3)
    go = threading.Event()
    slow = Notes(lambda call: assert_waits(go) if call == "start" else None)
    listeners = Listeners(built(slow), INFO, {})
    for _ in range(10):
        listeners.show(LOGGED)
    go.set()
    listeners.finish()
    assert list(listeners.warnings()) == ["t0 was too slow: 7 events were not passed to it"]
    assert slow.calls == ["start", "Logged", "Logged", "Logged", "finish"]


def test_nothing_is_passed_that_was_not_asked_for() -> None:
    notes = Notes()
    assert follow(notes, events=(Noted("x"), Stepped(1))) == []
    assert notes.calls == ["start", "finish"]


def assert_waits(go: threading.Event) -> None:
    assert go.wait(60)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "is no table of trackers"),
        ('{"paper": 5}', 'what is kept of "paper" is no table'),
        ("{", "cannot be read"),
    ],
)
def test_what_trackers_had_kept_is_an_error_where_it_cannot_be_that(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "trackers.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"trackers\.json: {told}"):
        saved_states(tmp_path)


def test_what_a_tracker_warns_of_is_a_warning_with_its_name_and_it_goes_on() -> None:
    class Worried(Notes):
        def warnings(self) -> list[str]:
            return ["earlier numbers are gone"] if self.calls == ["start"] else []

    tracker = Worried()
    listeners = Listeners([("notes", "tracker notes", lambda: tracker)], INFO, {})
    listeners.show(LOGGED)
    listeners.finish()
    assert list(listeners.warnings()) == ["tracker notes: earlier numbers are gone"]
    assert tracker.calls[-1] == "finish"
