"""Every rule of the tracker kit fails for a tracker that breaks it, and says why."""

from __future__ import annotations

import json
import re
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
from vtrain.testing.tracker import copied, events_of


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


def made(kind: type[Lines] = Lines, **members: object) -> type[Lines]:
    return type("Broken", (kind,), members)


PLANTED: tuple[tuple[str, str, str, Callable[[], type[Lines]]], ...] = (
    (
        "a class that is no event among those it asks for",
        "test_it_asks_for_events_that_there_are",
        "no events: [<class 'vtrain.contract.records.RunInfo'>]",
        lambda: made(events=(Logged, RunInfo)),
    ),
    ("nothing asked for", "test_it_asks_for_events_that_there_are", "it asks for no event", lambda: made(events=())),
    ("a list of events", "test_it_asks_for_events_that_there_are", "events is a list", lambda: made(events=[Logged])),
    (
        "`warning` for `warnings`",
        "test_abilities_of_the_tracker_are_spelt_right",
        "warning (for warnings of SupportsWarnings?)",
        lambda: made(warning=lambda self: ()),
    ),
    (
        "`warnings` that was renamed",
        "test_it_has_the_abilities_that_its_author_expects",
        "the tracker has lost SupportsWarnings: it has no warnings",
        lambda: made(),
    ),
    (
        "events that are never sent",
        "test_a_whole_run_is_taken",
        "nothing has arrived after finish",
        lambda: made(show=lambda self, event: None),
    ),
    (
        "a signal handler, which the main thread alone may set",
        "test_a_whole_run_is_taken",
        "signal only works in main thread",
        lambda: made(start=catching_signals),
    ),
    (
        "finish that goes by the last event",
        "test_a_run_without_events_is_taken",
        "'last'",
        lambda: made(finish=lambda self: print(self.last)),
    ),
    (
        "a list of an event cleared",
        "test_events_are_read_and_not_changed",
        "an event has changed: Logged",
        lambda: made(show=clearing),
    ),
    (
        "numbers as keys of its state",
        "test_its_state_is_json",
        "JSON changes",
        lambda: made(state=lambda self: {"shown": {self.shown: 1}}),
    ),
    (
        "a file that each start empties",
        "test_a_resumed_run_is_taken_up",
        "the earlier steps are gone",
        lambda: made(start=starting_afresh),
    ),
    (
        "a state that is taken to be there",
        "test_a_run_may_be_resumed_without_a_state",
        "'shown'",
        lambda: made(start=trusting),
    ),
    (
        "a file that must not exist yet",
        "test_a_run_may_start_again_in_its_folder",
        "File exists",
        lambda: made(start=creating),
    ),
    (
        "JSON without a word for infinity",
        "test_numbers_that_are_not_finite_are_taken",
        "Out of range float",
        lambda: made(show=strict),
    ),
    (
        "videos that are opened without a look",
        "test_a_video_that_is_gone_is_survived",
        "No such file",
        lambda: made(show=reading),
    ),
    (
        "a thread that uploads after finish",
        "test_nothing_keeps_the_process_alive",
        "still at work after finish: uploads",
        lambda: made(start=working_on),
    ),
    (
        "a warning that is given again and again",
        "test_it_warns_in_words_and_once",
        "warned of once more: ['the disk is nearly full']",
        lambda: made(Worried, warnings=lambda self: list(self.said)),
    ),
    (
        "a refused connection ignored",
        "test_a_service_that_refuses_is_an_error_or_a_warning",
        "nobody gets to know of it",
        lambda: made(show=lambda self, event: None),
    ),
    (
        "a service that is waited for without a limit",
        "test_a_service_that_refuses_is_an_error_or_a_warning",
        "it hangs: not over after 0.5 seconds",
        lambda: made(show=lambda self, event: GO.wait(60)),
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the tracker with the mistake in it)."""


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
@pytest.mark.parametrize(("rule", "says", "kind"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_a_tracker_that_breaks_it(
    rule: str, says: str, kind: Callable[[], type[Lines]], tmp_path: Path
) -> None:
    kit = Fixtures(kind(), tmp_path)
    kit.expects = frozenset({"SupportsWarnings"} if "expects" in rule else ())
    kit.limit_s = 0.5 if "hangs" in says else 60.0
    with pytest.raises((Exception, pytest.fail.Exception), match=re.escape(says)):
        kit.check(rule)


def test_every_rule_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(TrackerTests) == {rule for _, rule, _, _ in PLANTED}


def test_a_tracker_that_cannot_be_copied_is_asked_for_a_second_one() -> None:
    class Locked(Lines):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    said = r"Give a fixture `another`: a second Tracker with the same options; this one cannot be copied \(.*lock"
    with pytest.raises(pytest.fail.Exception, match=said):
        copied(Locked())
    tracker = Lines()
    second = copied(tracker)
    assert (type(second), second is tracker) == (Lines, False)


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
