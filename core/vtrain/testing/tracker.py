"""Rules of a tracker: a run's events from start to finish, what a checkpoint keeps of it, and a service that is not there."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Callable, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from vtrain.contract import Event, RunInfo, SupportsWarnings, Tracker
from vtrain.contract import events as stream
from vtrain.testing.sampler import check_expected, check_names, required

T = TypeVar("T")


def metrics(step: int) -> stream.StepMetrics:
    """The numbers of an optimizer step. Every other one has no norm of the gradient."""
    norm = 0.5 if step % 2 else None
    levels: list[float | list[float]] = [0.25, [0.0, 0.5, 0.5]]
    names, terms = ["clips/a.mp4", "clips/b.mp4"], {"crepa/loss": 0.1}
    return stream.StepMetrics(step, step / 8, 1 / step, 0.9 / step, 1e-4, norm, levels, names, 0.5, 0.01, 2**30, terms)


def events_of(folder: Path, first: int = 1) -> tuple[Event, ...]:
    """One event or more of every kind, as a run of 4 steps in `folder` yields them. first: its first step."""
    last, video = first + 3, folder / "samples" / "cat.mp4"
    return (
        stream.Planned("a run", folder, 1, "cpu", ("family toy (vtrain-toy 0.1.0)",)),
        stream.Scanned((stream.DatasetStatistics("clips", 9, 7, {"too short": 2}),)),
        stream.Estimated(4, 3.5, 2, (stream.Section("Steps", (("steps", "4"),)),)),
        stream.Filling("text", 3, 7),
        stream.Quarantined("clips/bad.mp4", "no video stream", None, "the folder is read-only"),
        stream.Filled(7, {"clips/c.mp4": "too short"}, 0),
        stream.Started(1, first - 1, last, None, {"train": {"steps": last}, "run": {"name": "a run"}}),
        stream.Stepped(first),
        stream.Noted("resuming from step 0"),
        stream.Logged((metrics(first), metrics(first + 1))),
        stream.Warned("1 clip skipped"),
        stream.Logged((metrics(first + 2),)),
        stream.LossSpike(
            first + 2, 9.5, 0.4, ("clips/a.mp4",), (0.25,), f"step {first + 2}: loss 9.5, expected about 0.4"
        ),
        stream.StepSkipped(
            first + 2, 1, 3, ("clips/b.mp4",), f"step {first + 2} was not taken: its loss is not finite"
        ),
        stream.Validating(last, 1),
        stream.Generating(last, "solving", 1, 1, 3, 10),
        stream.Validated(last, {"cat": video}, None, ("dog: out of memory",)),
        stream.Saved(last, folder / "checkpoints" / f"step-{last:06d}"),
        stream.Logged((metrics(last),)),
        stream.Failed("DataError", ("clips/a.mp4: it is gone.",)),
        stream.Ended(last, last, "finished"),
    )


def write_video(file: Path) -> Path:
    """An mp4 of 5 grey frames, 32x32."""
    import av
    import numpy as np

    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        video = container.add_stream("mpeg4", rate=8)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        for shade in range(0, 250, 50):
            picture = np.full((32, 32, 3), shade, dtype=np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
    return file


def copied(tracker: Tracker) -> Tracker:
    """A second one like it. Fails with what to give where it cannot be copied: a tracker may hold a lock or a connection."""
    try:
        return copy.deepcopy(tracker)
    except Exception as error:  # noqa: BLE001 - whatever stops the copy
        required("another", f"a second Tracker with the same options; this one cannot be copied ({error})")


class TrackerTests:
    """Where numbers and videos go. Every call comes from one thread, which is not the main one, as in a run.

    expects: names of the optional protocols (SupportsWarnings) that it is meant to have. limit_s: seconds after which a
    run counts as one that hangs.
    """

    expects: frozenset[str] = frozenset()
    limit_s: float = 60.0

    @pytest.fixture
    def tracker(self) -> Tracker:
        """A tracker, built and not started. Override it."""
        required("tracker", "a fresh Tracker, built from its options and not started")

    @pytest.fixture
    def another(self, tracker: Tracker) -> Tracker:
        """A second one with the same options, not started. Override it for a tracker that cannot be copied."""
        return copied(tracker)

    @pytest.fixture
    def received(self) -> Callable[[], Sized]:
        """What has arrived so far at the place to which `tracker` sends. Override it."""
        pytest.skip(
            "give a fixture `received`, a function that gives what has arrived so far, and what is sent is tested"
        )

    @pytest.fixture
    def unreachable(self) -> Tracker:
        """A tracker of a service that refuses connections. Override it."""
        pytest.skip(
            "give a fixture `unreachable`, a Tracker of a service that refuses connections, if it has a service"
        )

    @pytest.fixture
    def info(self, tmp_path: Path) -> RunInfo:
        return RunInfo("a run", str(tmp_path / "run"), {"train": {"steps": 4}, "tags": ["é", None, 1e-4]}, 0)

    @pytest.fixture
    def events(self, info: RunInfo) -> tuple[Event, ...]:
        """Of a run in `info`'s folder, whose video is there."""
        events = events_of(Path(info.output_dir))
        for event in events:
            if isinstance(event, stream.Validated):
                write_video(event.files["cat"])
        return events

    def in_thread(self, work: Callable[[], T]) -> T:
        """What `work` gives in a thread of its own; what it raises. Fails if it is not over in time."""
        found: list[T] = []
        raised: list[BaseException] = []

        def run() -> None:
            try:
                found.append(work())
            except BaseException as error:  # noqa: BLE001 - raised again below, in the test's own thread
                raised.append(error)

        thread = threading.Thread(target=run, name="listener", daemon=True)
        thread.start()
        thread.join(self.limit_s)
        if thread.is_alive():
            pytest.fail(f"it hangs: not over after {self.limit_s:g} seconds", pytrace=False)
        if raised:
            raise raised[0]
        return found[0]

    def follow(
        self, tracker: Tracker, info: RunInfo, events: tuple[Event, ...] = (), saved: Mapping[str, Any] | None = None
    ) -> list[Mapping[str, Any]]:
        """A whole run, as a session leads a tracker through it; its states after `start` and after each event."""

        def run() -> list[Mapping[str, Any]]:
            wanted = tuple(tracker.events)
            tracker.start(info, saved or {})
            states = [copy.deepcopy(tracker.state())]
            for event in events:
                if isinstance(event, wanted):
                    tracker.show(event)
                    states.append(copy.deepcopy(tracker.state()))
            tracker.finish()
            return states

        return self.in_thread(run)

    def test_it_asks_for_events_that_there_are(self, tracker: Tracker) -> None:
        """events is a tuple of event classes, not empty, the same each time."""
        wanted = tracker.events
        assert isinstance(wanted, tuple), f"events is a {type(wanted).__name__}"
        assert wanted, "it asks for no event"
        assert wanted == tracker.events
        odd = [each for each in wanted if each not in stream.EVENTS.values()]
        assert not odd, f"no events: {odd}"

    def test_abilities_of_the_tracker_are_spelt_right(self, tracker: Tracker) -> None:
        """No public name of the tracker is almost that of an ability which it lacks."""
        check_names("tracker", tracker)

    def test_it_has_the_abilities_that_its_author_expects(self, tracker: Tracker) -> None:
        """Each name in `expects` is a protocol that the tracker has."""
        check_expected(self.expects, {"tracker": tracker})

    def test_a_whole_run_is_taken(
        self, tracker: Tracker, info: RunInfo, events: tuple[Event, ...], received: Callable[[], Sized]
    ) -> None:
        """Every event that it asks for is taken, in a thread that is not the main one, and something of it arrives."""
        before = len(received())
        self.follow(tracker, info, events)
        assert len(received()) > before, "nothing has arrived after finish"

    def test_a_run_without_events_is_taken(self, tracker: Tracker, info: RunInfo) -> None:
        """A run may end before there is anything to show."""
        self.follow(tracker, info)

    def test_events_are_read_and_not_changed(self, tracker: Tracker, info: RunInfo, events: tuple[Event, ...]) -> None:
        """Other listeners get the same objects."""
        kept = copy.deepcopy(events)
        self.follow(tracker, info, events)
        changed = [type(event).__name__ for event, before in zip(events, kept, strict=True) if event != before]
        assert not changed, f"an event has changed: {', '.join(changed)}"

    def test_its_state_is_json(self, tracker: Tracker, info: RunInfo, events: tuple[Event, ...]) -> None:
        """After start and after each event, state gives what JSON holds as it is."""
        for state in self.follow(tracker, info, events):
            assert json.loads(json.dumps(dict(state), allow_nan=False)) == state, f"JSON changes {state}"

    def test_a_resumed_run_is_taken_up(
        self,
        tracker: Tracker,
        another: Tracker,
        info: RunInfo,
        events: tuple[Event, ...],
        received: Callable[[], Sized],
    ) -> None:
        """A second tracker with the first one's state takes the steps after a checkpoint, and they arrive beside the earlier."""
        saved = self.follow(tracker, info, events)[-1]
        before = len(received())
        later = {type(event): event for event in events_of(Path(info.output_dir), first=5)}
        # One event of each kind: less than before, so that it shows if what arrived then was thrown away.
        self.follow(another, replace(info, step=4), tuple(later.values()), json.loads(json.dumps(dict(saved))))
        assert len(received()) > before, "nothing of the resumed run has arrived, or the earlier steps are gone"

    def test_a_run_may_be_resumed_without_a_state(
        self, tracker: Tracker, info: RunInfo, events: tuple[Event, ...]
    ) -> None:
        """Of a checkpoint that was written before the tracker was in the file, it is given {} and a step above 0."""
        self.follow(tracker, replace(info, step=4), events_of(Path(info.output_dir), first=5))

    def test_a_run_may_start_again_in_its_folder(
        self, tracker: Tracker, another: Tracker, info: RunInfo, events: tuple[Event, ...]
    ) -> None:
        """A run that was stopped before its first checkpoint starts at step 0 again, in a folder with what it left there."""
        for each in (tracker, another):
            self.follow(each, info, events)

    def test_numbers_that_are_not_finite_are_taken(self, tracker: Tracker, info: RunInfo) -> None:
        """A step whose numbers are infinite or not a number does not end the tracker."""
        odd = replace(metrics(1), loss=math.inf, flow_loss=-math.inf, grad_norm=math.nan, terms={"a/b c": math.nan})
        self.follow(tracker, info, (stream.Logged((odd,)), stream.Logged((metrics(2),))))

    def test_a_video_that_is_gone_is_survived(self, tracker: Tracker, info: RunInfo) -> None:
        """A validation's file may be deleted before its event is shown; the numbers after it are taken."""
        gone = stream.Validated(2, {"cat": Path(info.output_dir) / "gone.mp4"}, None)
        self.follow(tracker, info, (gone, stream.Logged((metrics(3),))))

    def test_nothing_keeps_the_process_alive(self, tracker: Tracker, info: RunInfo, events: tuple[Event, ...]) -> None:
        """After finish no thread of its own is left that the process would wait for: only daemons may be."""
        before = set(threading.enumerate())
        self.follow(tracker, info, events)
        left = [each.name for each in set(threading.enumerate()) - before if not each.daemon]
        assert not left, f"still at work after finish: {', '.join(left)}"

    def test_it_warns_in_words_and_once(self, tracker: Tracker, info: RunInfo, events: tuple[Event, ...]) -> None:
        """With SupportsWarnings: warnings gives texts, and none of them again."""
        if not isinstance(tracker, SupportsWarnings):
            pytest.skip("this tracker warns of nothing (SupportsWarnings)")
        self.follow(tracker, info, events)
        said = list(tracker.warnings())
        assert all(isinstance(text, str) and text for text in said), f"no texts: {said}"
        again = list(tracker.warnings())
        assert not again, f"warned of once more: {again}"

    def test_a_service_that_refuses_is_an_error_or_a_warning(
        self, unreachable: Tracker, info: RunInfo, events: tuple[Event, ...]
    ) -> None:
        """It raises, and is off for the rest of the run, or it warns and is tried again: it neither hangs nor is silent."""
        said: list[str] = []
        try:
            self.follow(unreachable, info, events)
        except Exception as error:  # noqa: BLE001 - any will do, for the run names it
            said.append(str(error))
        if isinstance(unreachable, SupportsWarnings):
            said += unreachable.warnings()
        assert any(said), "nothing arrives, and nobody gets to know of it"
