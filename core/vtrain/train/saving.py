"""Checkpoints written beside training: what they keep is copied to main memory, and a thread writes it during the next steps.

One is written at a time. Training waits where the run ends, where main memory has no room for the copy, and on a CPU, which has
no second one to compute with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from vtrain.contract import CheckpointError, Duration, Event, Noted, Saved, Warned
from vtrain.contract.rooms import host_memory
from vtrain.contract.specs import bytes_text
from vtrain.train import checkpoint
from vtrain.train.piece import Copies, Piece, State
from vtrain.train.processes import Processes
from vtrain.train.readback import ReloadNeeded, remarks

LEAST = 64 << 20
"""Bytes from which on a checkpoint is written beside training: a smaller one is on the disk before a thread would be worth it."""

SPARE = 1 << 30
"""Bytes of main memory that stay free."""

PATIENCE_S = 10.0
"""Seconds of waiting for the thread after which it is said that training waits."""

ROOMY = 8 << 30
"""Bytes of it that must be free beside a copy for its memory to stay until the next one."""


@dataclass
class _Work:
    """A checkpoint to write. states: of its pieces in order; None: they are gathered as they are written."""

    step: int
    pieces: Sequence[Piece]
    states: list[State] | None
    future: Future[tuple[Saved, list[str]]] | None = None


class Saver:
    """Writes the checkpoints of a run below `parent`, of which `keep` stay. Every process has one, and calls it at the same steps.
    beside: whether training continues meanwhile, where it can."""

    def __init__(self, parent: Path, keep: int | Literal["all"], processes: Processes, *, beside: bool) -> None:
        self._parent, self._keep, self._processes, self._beside = parent, keep, processes, beside
        self._work: _Work | None = None
        self._crowded = False
        self._copies: dict[str, Copies] = {}

    @property
    def written(self) -> bool:
        """Whether this process has finished what it was writing, so that `settle` does not wait."""
        return self._work is not None and self._work.future is not None and self._work.future.done()

    @property
    def writing(self) -> bool:
        """Whether one is being written, the same on every process."""
        return self._work is not None

    def save(self, step: int, pieces: Sequence[Piece], *, now: bool) -> Iterator[Event]:
        """Begin to write the checkpoint of `step`; none is being written. now: wait until it is on the disk.

        Raises CheckpointError on all processes.
        """
        assert self._work is None
        size, room = self._processes.from_first(lambda: (sum(piece.bytes for piece in pieces), self._room()))
        large = self._beside and size >= LEAST
        fits = room is None or size + SPARE <= room
        if large and not fits and not self._crowded:
            self._crowded = True
            yield Noted(
                f"training waits while checkpoints are written: a copy takes {bytes_text(size)} of main memory, and "
                f"{bytes_text(room or 0)} are free"
            )
        if not fits:
            self._copies.clear()
        if not large or not fits or now:
            self._work = _Work(step, pieces, None)
            yield from self.settle()
            return
        copies = [self._copies.setdefault(piece.name, Copies()) for piece in pieces]
        states = [
            piece.gather(keep=self._processes.first, copy=copy) for piece, copy in zip(pieces, copies, strict=True)
        ]
        work = self._work = _Work(step, pieces, states)
        if self._processes.first:
            work.future = Future()
            # A daemon, so that a disk that never answers does not keep a process that is to end.
            threading.Thread(
                target=self._write_beside, args=(work, work.future), name="checkpoint", daemon=True
            ).start()

    def _write_beside(self, work: _Work, future: Future[tuple[Saved, list[str]]]) -> None:
        try:
            future.set_result(self._write(work, reload=False))
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)

    def settle(self) -> Iterator[Event]:
        """Wait for what is being written, and say what became of it. Raises CheckpointError on all processes."""
        work = self._work
        if work is None:
            return
        if work.future is not None and not wait([work.future], PATIENCE_S).done:
            yield Noted(
                f"training waits: the checkpoint of step {work.step} is still being written to {self._parent}. "
                "A second Ctrl-C ends the run without it"
            )
        self._work = None
        if work.states is None and not self._processes.first:
            # In the order in which `checkpoint.write` gathers them on the first process: each may be collective.
            for piece in work.pieces:
                piece.gather(keep=False)
        saved, troubles = self._processes.from_first(lambda: self._result(work))
        if (free := host_memory()) is not None and free < ROOMY:
            self._copies.clear()
        yield saved
        yield from map(Warned, troubles)

    def _room(self) -> int | None:
        """Bytes of main memory that a copy may take."""
        free = host_memory()
        return None if free is None else free + sum(copies.bytes for copies in self._copies.values())

    def _result(self, work: _Work) -> tuple[Saved, list[str]]:
        if work.future is None:
            return self._write(work)
        try:
            return work.future.result()
        except ReloadNeeded:  # a model is loaded to compare it, which is not done beside another that computes
            self._beside = False
            return self._write(work)

    def _write(self, work: _Work, *, reload: bool = True) -> tuple[Saved, list[str]]:
        begun = time.monotonic()
        folder = checkpoint.write(self._parent, work.step, work.pieces, work.states, reload=reload)
        said, deleted = remarks(folder, work.pieces), list[Path]()
        try:
            deleted = checkpoint.prune(self._parent, self._keep, folder)
        # The new checkpoint is whole and has verified: old ones that stay cost disk alone.
        except OSError as error:
            said = [*said, f"an older checkpoint could not be deleted: {error}"]
        return Saved(work.step, folder, tuple(deleted), round(time.monotonic() - begun, 3)), said

    def left(self) -> Iterator[Event]:
        """Where a run ends by an error: wait for what is being written, and say what became of it. No other process is asked."""
        work, self._work = self._work, None
        if work is None or work.future is None:
            return
        try:
            saved, troubles = self._result(work)
        except Exception as error:  # noqa: BLE001 - what ends the run is another error, which is raised
            which = (
                "" if isinstance(error, CheckpointError) else f"the checkpoint of step {work.step} was not written: "
            )
            yield Warned(f"{which}{error}")
            return
        yield saved
        yield from map(Warned, troubles)

    def close(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Wait for what is being written, but not after a second Ctrl-C, which ends a run at once.

        Who closes a run in the middle does not learn what became of it: a resume looks at the folder.
        """
        work, self._work = self._work, None
        if work is not None and work.future is not None and kind is not KeyboardInterrupt:
            wait([work.future])


class Interval:
    """Tells after which optimizer steps something is due. In steps or epochs it is a pure function of the step.

    In seconds it counts from its making, and again from each `done`.
    """

    def __init__(self, every: Duration, steps_per_epoch: float, now: float) -> None:
        """now: seconds on the clock that `due` and `done` are given."""
        self.steps = every.in_steps(steps_per_epoch)
        self.seconds = every.value
        self.last = now

    def due(self, steps: int, now: float) -> bool:
        """steps: optimizer steps done, >= 1."""
        return self.falls_on(steps) if self.steps is not None else now - self.last >= self.seconds

    def falls_on(self, steps: int) -> bool:
        """Whether it is due after this step whatever the clock says."""
        return self.steps is not None and steps % self.steps == 0

    def done(self, now: float) -> None:
        """What was due has been done."""
        self.last = now

    @property
    def timed(self) -> bool:
        return self.steps is None


class Saves(Protocol):
    """How checkpoints are written. Every process calls it, at the same steps."""

    @property
    def writing(self) -> bool:
        """Whether one is being written beside training, the same on every process."""
        ...

    @property
    def written(self) -> bool:
        """Whether this process has just finished one, so that `settle` does not wait."""
        ...

    def save(self, step: int, micro_batch: int, *, now: bool) -> Iterator[Event]:
        """Begin the checkpoint after `step`, with none being written. micro_batch: the next one. now: wait for it. Raises
        CheckpointError on all."""
        ...

    def settle(self) -> Iterator[Event]:
        """Wait for the one that is being written. Raises CheckpointError on all if it could not be."""
        ...

    def left(self) -> Iterator[Event]:
        """The same where this process ends by an error: it asks no other, and what went wrong is a warning."""
        ...


class Unsaved:
    """Of a loop without checkpoints."""

    writing = written = False

    def save(self, step: int, micro_batch: int, *, now: bool) -> Iterator[Event]:
        """Nothing."""
        return iter(())

    def settle(self) -> Iterator[Event]:
        """Nothing."""
        return iter(())

    left = settle
