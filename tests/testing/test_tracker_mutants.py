"""Every rule of the tracker kit fails for a tracker that breaks it, and says why."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from vtrain.contract import Event, Logged, RunInfo, Validated
from vtrain.contract.events import EVENTS
from vtrain.testing import TrackerTests
from vtrain.testing.tracker import events_of


class Lines:
    """A sound tracker: a line for each event, in a file of the run's folder. Its mutants replace members."""

    events: Any = (Logged, Validated)

    def __init__(self) -> None:
        self.shown = 0

    def start(self, run: RunInfo, saved: Mapping[str, Any]) -> None:
        self.file = Path(run.output_dir) / "lines.txt"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.shown = int(saved.get("shown", 0))

    def show(self, event: Event) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{event}\n")
        self.shown += 1

    def state(self) -> Mapping[str, Any]:
        return {"shown": self.shown}

    def finish(self) -> None:
        pass


class Worried(Lines):
    """A sound one that warns."""

    said: tuple[str, ...] = ("the disk is nearly full",)

    def warnings(self) -> list[str]:
        said, self.said = self.said, ()
        return list(said)


class Posting(Worried):
    """A sound one that sends to a port where nobody listens, and warns of it."""

    said = ()

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    def show(self, event: Event) -> None:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except OSError as error:
            self.said = (f"127.0.0.1:{self.port} cannot be reached: {error}",)


def starting_afresh(self: Lines, run: RunInfo, saved: Mapping[str, Any]) -> None:
    """What earlier steps left is gone."""
    Lines.start(self, run, saved)
    self.file.write_text("")


def trusting(self: Lines, run: RunInfo, saved: Mapping[str, Any]) -> None:
    Lines.start(self, run, saved if run.step == 0 else {"shown": saved["shown"]})


def creating(self: Lines, run: RunInfo, saved: Mapping[str, Any]) -> None:
    Lines.start(self, run, saved)
    if not saved:
        self.file.touch(exist_ok=False)


def catching_signals(self: Lines, run: RunInfo, saved: Mapping[str, Any]) -> None:
    Lines.start(self, run, saved)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def clearing(self: Lines, event: Event) -> None:
    Lines.show(self, event)
    if isinstance(event, Logged):
        event.steps[0].samples.clear()


def strict(self: Lines, event: Event) -> None:
    if isinstance(event, Logged):
        json.dumps(event.steps[0].scalars(), allow_nan=False)


def reading(self: Lines, event: Event) -> None:
    if isinstance(event, Validated):
        for file in event.files.values():
            file.read_bytes()


GO = threading.Event()


def working_on(self: Lines, run: RunInfo, saved: Mapping[str, Any]) -> None:
    Lines.start(self, run, saved)
    threading.Thread(target=GO.wait, name="uploads", args=(60,), daemon=False).start()


TRACKERS: Mapping[str, tuple[type[Lines], Mapping[str, Any], str]] = {
    "test_it_asks_for_events_that_there_are": (Lines, {"events": (Logged, RunInfo)}, "no events: .*RunInfo"),
    "test_abilities_of_the_tracker_are_spelt_right": (
        Lines,
        {"warning": lambda self: ()},
        r"warning \(for warnings of SupportsWarnings\?\)",
    ),
    "test_it_has_the_abilities_that_its_author_expects": (
        Lines,
        {},
        "the tracker has lost SupportsWarnings: it has no warnings",
    ),
    "test_a_whole_run_is_taken": (Lines, {"show": lambda self, event: None}, "nothing has arrived after finish"),
    "test_a_run_without_events_is_taken": (Lines, {"finish": lambda self: print(self.last)}, "'last'"),
    "test_events_are_read_and_not_changed": (Lines, {"show": clearing}, "assert"),
    "test_its_state_is_json": (Lines, {"state": lambda self: {"shown": {self.shown: 1}}}, "JSON changes"),
    "test_a_resumed_run_is_taken_up": (Lines, {"start": starting_afresh}, "the earlier steps are gone"),
    "test_a_run_may_be_resumed_without_a_state": (Lines, {"start": trusting}, "'shown'"),
    "test_a_run_may_start_again_in_its_folder": (Lines, {"start": creating}, "File exists"),
    "test_numbers_that_are_not_finite_are_taken": (Lines, {"show": strict}, "Out of range float"),
    "test_a_video_that_is_gone_is_survived": (Lines, {"show": reading}, "No such file"),
    "test_nothing_keeps_the_process_alive": (Lines, {"start": working_on}, "still at work after finish: uploads"),
    "test_it_warns_in_words_and_once": (
        Worried,
        {"warnings": lambda self: list(self.said)},
        "warned of once more: .*the disk is nearly full",
    ),
    "test_a_service_that_refuses_is_an_error_or_a_warning": (
        Lines,
        {"show": lambda self, event: None},
        "nobody gets to know of it",
    ),
}


class Fixtures(TrackerTests):
    """What the kit's rules are given, for one tracker."""

    def __init__(self, kind: type[Lines], folder: Path) -> None:
        folder = folder / "run"
        self.given = {
            "tracker": kind(),
            "another": kind(),
            "unreachable": kind(),
            "info": RunInfo("a run", str(folder), {}, 0),
            "events": events_of(folder),
            "received": lambda: (folder / "lines.txt").read_bytes() if (folder / "lines.txt").exists() else b"",
        }

    def check(self, rule: str) -> None:
        test = getattr(TrackerTests, rule)
        names = test.__code__.co_varnames[1 : test.__code__.co_argcount]
        test(self, **{name: self.given[name] for name in names})


@pytest.fixture
def release() -> Iterator[None]:
    """The threads of mutants that would wait for ever."""
    GO.clear()
    yield
    GO.set()


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize("rule", TRACKERS)
def test_the_rule_fails_for_a_tracker_that_breaks_it(rule: str, tmp_path: Path) -> None:
    kind, members, words = TRACKERS[rule]
    kit = Fixtures(type("Broken", (kind,), dict(members)), tmp_path)
    kit.expects = frozenset({"SupportsWarnings"} if "expects" in rule else ())
    with pytest.raises((Exception, pytest.fail.Exception), match=words):
        kit.check(rule)


@pytest.mark.parametrize("events", [(), [Logged], ("Logged",)], ids=["none", "a list", "names"])
def test_what_a_tracker_asks_for_is_classes_of_events_in_a_tuple(events: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="event"):
        Fixtures(type("Broken", (Lines,), {"events": events}), tmp_path).check("test_it_asks_for_events_that_there_are")


def test_a_tracker_that_works_in_the_main_thread_alone_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="main thread"):
        Fixtures(type("Broken", (Lines,), {"start": catching_signals}), tmp_path).check("test_a_whole_run_is_taken")


def test_a_tracker_that_hangs_is_found(tmp_path: Path) -> None:
    go = threading.Event()
    kit = Fixtures(type("Broken", (Lines,), {"show": lambda self, event: go.wait(60)}), tmp_path)
    kit.limit_s = 0.2
    with pytest.raises(pytest.fail.Exception, match=r"it hangs: not over after 0\.2 seconds"):
        kit.check("test_a_service_that_refuses_is_an_error_or_a_warning")
    go.set()


def test_every_rule_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(TrackerTests) == TRACKERS.keys()


def test_the_kit_shows_an_event_of_every_kind(tmp_path: Path) -> None:
    assert {type(event) for event in events_of(tmp_path)} == set(EVENTS.values())


class TestASoundTracker(TrackerTests):
    """What the mutants are made from passes every rule."""

    @pytest.fixture
    def tracker(self) -> Lines:
        return Lines()

    @pytest.fixture
    def received(self, info: RunInfo) -> Callable[[], bytes]:
        file = Path(info.output_dir) / "lines.txt"
        return lambda: file.read_bytes() if file.exists() else b""


class TestASoundTrackerOfAllEvents(TestASoundTracker):
    """So does one that asks for everything, warns, and has a service."""

    expects = frozenset({"SupportsWarnings"})

    @pytest.fixture
    def tracker(self) -> Worried:
        tracker = Worried()
        tracker.events = tuple(EVENTS.values())
        return tracker

    @pytest.fixture
    def unreachable(self) -> Posting:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            return Posting(unused.getsockname()[1])
