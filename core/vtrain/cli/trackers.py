"""Feeds trackers from a thread of their own: whatever they do, training goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from vtrain.contract import Registered, RunInfo, Tracker
from vtrain.train.loop import Event, Logged, Validated

PATIENCE = 60.0
"""Seconds that the end of a run waits for trackers."""

Job = Callable[[Tracker], None]


class Trackers:
    """Passes events to every tracker, in order. One that fails is told once and left out from then on."""

    def __init__(
        self, trackers: Sequence[tuple[Registered, Tracker]], info: RunInfo, warn: Callable[[str], None]
    ) -> None:
        self.alive = list(trackers)
        self.warn = warn
        self.jobs: queue.Queue[Job | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self.jobs.put(lambda tracker: tracker.start(info))

    def __enter__(self) -> Trackers:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all is passed on, but not for ever."""
        self.jobs.put(lambda tracker: tracker.finish())
        self.jobs.put(None)
        self.thread.join(timeout=PATIENCE)
        if self.thread.is_alive():
            self.warn(
                f"trackers did not finish within {PATIENCE:g} seconds; their last numbers may be missing (metrics.jsonl has all)"
            )

    def show(self, event: Event) -> None:
        if isinstance(event, Logged):
            for row in event.rows:
                step, scalars = row.step, row.scalars()
                self.jobs.put(lambda tracker, step=step, scalars=scalars: tracker.scalars(step, scalars))  # type: ignore[misc]
        elif isinstance(event, Validated):
            done, files = event.step, event.files
            self.jobs.put(lambda tracker: tracker.videos(done, files))

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            for part, tracker in list(self.alive):
                try:
                    job(tracker)
                except BaseException as error:  # SystemExit too: it would end this thread without a word
                    self.alive.remove((part, tracker))
                    name = f"{part.spec.name} ({part.distribution} {part.version})"
                    self.warn(f"tracker {name} failed and is left out from here on: {type(error).__name__}: {error}")
