"""Whoever listens to a run: each in a thread of its own, behind a bounded queue, so that none can change, slow or end it.

A listener that raises is warned of and hears nothing more. One that is too slow misses events, and their number is warned of.
One that never comes back is waited for at the end only so long.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from vtrain.config import Config
from vtrain.contract import Event, RunInfo, SupportsWarnings, Tracker, TrackerSpec
from vtrain.contract.abilities import lacking
from vtrain.contract.plugin_rules import line_of, said
from vtrain.contract.specs import listed
from vtrain.train import checkpoint
from vtrain.train.piece import Copies, Keep, State

PATIENCE_S = 60.0
"""Seconds that the end of a run waits for all listeners together."""
_LOOK_S = 0.01
ROOM = 1024
"""Events that may wait for a listener."""

FILE = "trackers.json"

Kept = Mapping[str, Any]


class Listener:
    """One tracker at work. key: what its state is kept under. name: as warnings call it."""

    def __init__(self, key: str, name: str, tracker: Tracker, info: RunInfo, saved: Kept, warn: deque[str]) -> None:
        """Raises what the tracker raises when it is asked for its events; TypeError if it is none, or they are none."""
        self.key, self.name, self._tracker, self._warn = key, name, tracker, warn
        if fault := lacking("tracker", tracker):
            raise TypeError(f"its build gave {fault}")
        self._info, self._saved = info, saved
        self._wanted = tuple(tracker.events)
        if odd := [each for each in self._wanted if not (isinstance(each, type) and issubclass(each, Event))]:
            raise TypeError(f"its events are no types of events: {odd}")
        self._queue: queue.Queue[Event | None] = queue.Queue(ROOM)
        self._missed, self._doing = 0, "start"
        self._warns = tracker if isinstance(tracker, SupportsWarnings) else None
        self._state: Kept = saved
        # A daemon: a tracker that never comes back must not keep the process alive.
        self.thread = threading.Thread(target=self._work, name=f"listener {name}", daemon=True)
        self.thread.start()

    def show(self, event: Event) -> None:
        """Pass an event on, if it asks for such; never waits."""
        if isinstance(event, self._wanted) and self.thread.is_alive():
            try:
                self._queue.put_nowait(event)
            except queue.Full:
                self._missed += 1

    def state(self) -> Kept:
        """What it wants to be given when the run is resumed, as of the last event that it has dealt with."""
        return self._state

    def close(self) -> bool:
        """There are no more events: whether there was room to say so. Never waits."""
        with suppress(queue.Full):
            self._queue.put_nowait(None)
            return True
        return False

    def join(self, until: float) -> None:
        """Wait until it has dealt with everything, but not beyond `until`."""
        self.thread.join(max(0.0, until - time.monotonic()))
        if self.thread.is_alive():
            self._warn.append(
                f"{self.name} did not finish within {PATIENCE_S:g} seconds (it is in {self._doing}); its last numbers may be "
                "missing"
            )
        if self._missed:
            self._warn.append(f"{self.name} was too slow: {self._missed} events were not passed to it")

    def _work(self) -> None:
        try:
            self._tracker.start(self._info, self._saved)
            self._keep()
            while (event := self._queue.get()) is not None:
                self._doing = f"show({type(event).__name__})"
                self._tracker.show(event)
                self._keep()
            self._doing = "finish"
            self._tracker.finish()
        except BaseException as error:  # noqa: BLE001 - SystemExit too: it would end this thread without a word
            place = line_of(error, type(self._tracker).__module__)
            where = f"in {self._doing}{f', {place}' if place else ''}"
            self._warn.append(f"{self.name} failed and is off for the rest of the run: {said(error)} ({where})")

    def _keep(self) -> None:
        """A copy that nobody changes while a checkpoint is written; and what it warns of. Raises TypeError for what is not JSON."""
        self._doing = "state"
        self._state = json.loads(json.dumps(dict(self._tracker.state())))
        if self._warns is not None:
            self._warn.extend(f"{self.name}: {text}" for text in self._warns.warnings())


Built = tuple[str, str, Callable[[], Tracker]]
"""What a tracker's state is kept under, its name in warnings, and what builds it."""


def trackers(config: Config) -> Iterator[Built]:
    """Those of [[tracker]]. A state is kept under the tracker's name, and its number among those of that name."""
    seen = Counter[str]()
    for part in config.trackers:
        spec = part.registered.spec
        assert isinstance(spec, TrackerSpec)
        seen[spec.name] += 1
        key = spec.name if seen[spec.name] == 1 else f"{spec.name} {seen[spec.name]}"
        name = f"tracker {key} ({part.registered.distribution} {part.registered.version})"
        yield key, name, partial(spec.build, part.options)


class Listeners:
    """All of them. One that cannot be built is warned of. saved: by the same key, what its state was at the checkpoint that
    is resumed from."""

    def __init__(self, trackers: Iterable[Built], info: RunInfo, saved: Mapping[str, Kept]) -> None:
        self._warnings: deque[str] = deque()
        self._all: list[Listener] = []
        self._finished = False
        for key, name, build in trackers:
            try:
                self._all.append(Listener(key, name, build(), info, saved.get(key, {}), self._warnings))
            except Exception as error:  # noqa: BLE001 - no listener ends a run
                self._warnings.append(f"{name} could not be built and is off: {type(error).__name__}: {error}")

    def show(self, event: Event) -> None:
        for each in self._all:
            each.show(event)

    def states(self) -> dict[str, Kept]:
        """Key -> what it wants to be given when the run is resumed; of those that want something."""
        return {each.key: state for each in self._all if (state := each.state())}

    @property
    def piece(self) -> ListenersPiece:
        """What of them goes into each checkpoint."""
        return ListenersPiece(self)

    def warnings(self) -> Iterator[str]:
        """What went wrong with listeners since the last call."""
        while self._warnings:
            yield self._warnings.popleft()

    def finish(self) -> None:
        """Wait until all have heard everything, but not for ever. A second time there is nothing to wait for."""
        if self._finished:
            return
        self._finished = True
        # All hear of the end before any is waited for: they finish beside each other, within one patience.
        until, busy = time.monotonic() + PATIENCE_S, self._all
        while (busy := [each for each in busy if not each.close()]) and time.monotonic() < until:
            time.sleep(_LOOK_S)
        for each in self._all:
            each.join(until)


@dataclass(frozen=True)
class ListenersPiece:
    """What listeners want to be given when the run is resumed, in a checkpoint."""

    listeners: Listeners
    name: ClassVar[str] = "trackers"
    files: ClassVar[tuple[str, ...]] = (FILE,)
    bytes: ClassVar[int] = 0

    def gather(self, *, keep: Keep, copy: Copies | None = None) -> State:
        return State(values=self.listeners.states()) if keep else State()

    def write(self, folder: Path, state: State) -> None:
        (folder / FILE).write_text(json.dumps(state.values, indent=1), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Nothing: they were started with it, by `saved_states`."""


def saved_states(folder: Path | None) -> Mapping[str, Kept]:
    """What listeners had kept in a checkpoint; {} for none, and in one of before there was such a thing.

    Raises CheckpointError if it cannot be read.
    """
    if folder is None or not (folder / FILE).exists():
        return {}
    found = checkpoint.read_json(folder / FILE)
    if not isinstance(found, dict):
        raise checkpoint.misread(folder / FILE, "is no table of trackers.")
    if odd := [key for key, state in found.items() if not isinstance(state, dict)]:
        raise checkpoint.misread(folder / FILE, f"what is kept of {listed(odd)} is no table.")
    return found
