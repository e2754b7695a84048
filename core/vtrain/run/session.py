"""One run, from its configuration to its last checkpoint, as an iterator of events: whoever takes the next event drives it.

The chapters stand in `Session._chapters`, in order. Every event is recorded first, then shown to the listeners, then given to
the consumer. Closed in the middle, everything that is on the disk is whole, and the output folder is free.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from vtrain.contract import (
    CheckpointError,
    ConfigError,
    DataError,
    DatasetStatistics,
    Ended,
    Estimated,
    Event,
    Failed,
    Filled,
    Noted,
    Planned,
    Quarantined,
    RunInfo,
    Scanned,
    Started,
    VtrainError,
    Warned,
)
from vtrain.data.scanning.quarantine import move_bad
from vtrain.data.scanning.scan import Scan, scan
from vtrain.data.scanning.surveys import Survey
from vtrain.estimate.estimate import Estimate, make_estimate
from vtrain.estimate.render import sections
from vtrain.plan.places import SAMPLES
from vtrain.registry.blame import blame
from vtrain.run.alike import check_alike
from vtrain.run.collector import uncollected
from vtrain.run.inbox import Inbox
from vtrain.run.lines import RecordsPiece
from vtrain.run.listeners import Listeners, saved_states, trackers
from vtrain.run.memory import MemoryReport, agreed, explained
from vtrain.run.output import (
    FailedValidations,
    Recorder,
    hold,
    occupied,
    open_records,
    unwritable,
    validation_owed,
    write_run_files,
)
from vtrain.run.prepare import alone_though, extra_texts, notices, planned, scanned

if TYPE_CHECKING:
    from vtrain.data.caching.caches import Caches, FilledCaches
    from vtrain.train.assemble import Trainer
    from vtrain.train.piece import Piece
    from vtrain.train.processes import Processes
    from vtrain.train.resume import Start
    from vtrain.validate.generate import Validation


@dataclass(frozen=True)
class Data:
    """What can be trained on, and what the run amounts to with it."""

    filled: FilledCaches
    survey: Survey
    estimate: Estimate


class Session:
    """A context manager over the events of a run, and their iterator. plan: there from the start of the with block.

    signal: number of the signal that ended the run early, None if none did. Raises, on entering, ConfigError and all else
    that planning does, DeviceError; while events are taken, the other errors of vtrain.
    """

    def __init__(
        self,
        config: Path,
        *,
        until: Literal["trained", "filled"] = "trained",
        signals: bool = False,
        heard: Callable[[], None] = lambda: None,
        process_ends: bool = False,
        base: Path | None = None,
    ) -> None:
        """until: filled, to end when the caches are. signals: whether Ctrl-C and SIGTERM ask the run to save and end, in the
        main thread alone; heard: called when they do. Without, Ctrl-C is a KeyboardInterrupt like any other.

        process_ends: the process ends with it, so that nothing need be made ready for another. base: where the file's paths start.
        """
        self._path, self._base, self._until = config, base, until
        self._signals, self._process_ends = signals, process_ends
        self._inbox = Inbox(heard)
        self._events: Generator[Event, None, None] | None = None
        self._listeners: Listeners | None = None
        self._lock = ExitStack()
        self._data: Data | None = None
        self._resumed: dict[str, Any] | None = None
        self.signal: int | None = None

    def __enter__(self) -> Session:
        if self._signals and threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signals=True works in the main thread only: Python gives signals to no other")
        with uncollected():
            self.plan = planned(self._path, base=self._base)
            from vtrain.train.processes import Processes

            self.processes: Processes = Processes(self.plan.config.precision.mixed, self.plan.loaded)
            try:
                self.plan = agreed(self.plan, self._path, self.processes)
                if self.plan.config.run.deterministic:
                    self.processes.device.deterministic()  # before any work: cuBLAS reads its setting once
                if self.processes.count != self.plan.processes:
                    raise ConfigError(alone_though(self.plan, self.processes.count))
            except VtrainError:  # on all processes alike
                self.processes.close()
                raise
        self._inbox.validates = self.plan.validation is not None
        self._recorder = Recorder(self.plan.config.run.output_dir, self._restore)
        self._events = self._stream()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._events is not None:
                self._events.close()
        finally:
            self.processes.close(failed=error is not None)
            if not self._process_ends:
                gc.unfreeze()  # `uncollected` froze what belongs to this run
                self.processes.device.release()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._events is None:
            raise RuntimeError("a run gives its events inside its with block")
        return next(self._events)

    def ask(self, word: Literal["stop", "save", "validate"]) -> None:
        """Ask something of the run, from any thread: it is done at the end of the step."""
        self._inbox.ask(word)

    # -- the stream --------------------------------------------------------------------------------------------------------

    def _stream(self) -> Generator[Event, None, None]:
        """Every event, recorded and shown to the listeners. An error is an event too, and then raised."""
        try:
            with blame(self.plan.config.parts()):
                for event in self._chapters():
                    yield from self._passed(event)
                self._recorder.check_written()
        # Not BaseException: a generator that is closed may yield nothing more.
        except Exception as raised:
            error = self.processes.lost(raised) or raised
            lines = tuple(map(str, error.problems)) if isinstance(error, VtrainError) else (str(error),)
            yield from self._passed(Failed(type(error).__name__, lines))
            yield from self._listeners_end()
            if error is raised:
                raise
            raise error from raised
        else:
            yield from self._listeners_end()
        finally:
            if self._listeners is not None:
                self._listeners.finish()
            self._lock.close()

    def _listeners_end(self) -> Iterator[Event]:
        """Wait for all listeners; what went wrong with them."""
        if self._listeners is not None:
            self._listeners.finish()
            for text in self._listeners.warnings():
                yield from self._passed(Warned(text))

    def _passed(self, event: Event) -> Iterator[Event]:
        """Recorded, shown, given; and what went wrong in doing so."""
        troubles = list(self._recorder.record(event)) if self.processes.first else []
        if self._listeners is not None:
            self._listeners.show(event)
            troubles += [Warned(text) for text in self._listeners.warnings()]
        yield event
        for warning in troubles:
            if self.processes.first:
                list(self._recorder.record(warning))  # what goes wrong with a warning is not warned of in turn
            if self._listeners is not None:
                self._listeners.show(warning)
            yield warning

    # -- the chapters ------------------------------------------------------------------------------------------------------

    def _chapters(self) -> Iterator[Event]:
        """A run, from beginning to end."""
        yield from self._introduced()
        if self._until == "filled":
            check_alike(self.plan, self.processes, trains=False)
            found, _ = yield from self._scanned(estimated=False)
            yield from self._caches(found)
            yield from self._quarantined()
            return
        if warning := self._alone():
            yield Warned(warning)
        check_alike(self.plan, self.processes)
        self.processes.from_first(self._watch)
        # Before anything is scanned or encoded: what refuses a resume is said at once.
        start = self._start()
        found, estimate = yield from self._scanned(estimated=True)
        assert estimate is not None
        if self._is_done(start, estimate):
            yield Ended(start.state.step, estimate.steps, "nothing to do")
            return
        for notice in (*start.notices, *start.changes):
            yield Noted(notice)
        for warning in start.warnings:
            yield Warned(warning)
        data = self._data = yield from self._read(found, estimate)
        self._inbox.look()
        if self.processes.any(self._inbox.stop)[0]:  # asked for while the caches filled
            yield Ended(start.state.step, data.estimate.steps, "stopped")
            return
        with self._assembled(start, data) as (trainer, caches):
            yield from self._begun(trainer, data)
            yield from self._trained(trainer, caches)

    def _introduced(self) -> Iterator[Event]:
        config, processes = self.plan.config, self.processes
        parts = tuple(
            f"{each.spec.kind} {each.spec.name} ({each.distribution} {each.version})" for each in config.parts()
        )
        yield Planned(config.run.name, config.run.output_dir, processes.count, str(processes.device), parts)
        for notice in dict.fromkeys(processes.gathered([*processes.notices, *notices(self.plan, processes.device)])):
            yield Warned(notice)

    def _alone(self) -> str:
        """The first process holds the output folder, to the end of the stream. Gives a warning, "" for none. Raises
        CheckpointError on all if another run has it, or if something cannot be written."""
        return self.processes.from_first(lambda: self._lock.enter_context(occupied(self.plan.config)))

    def _watch(self) -> None:
        """Hear what the control file asks from here on. Raises CheckpointError."""
        folder = self.plan.config.run.output_dir
        try:
            self._inbox.watch(folder)
        except OSError as error:
            raise unwritable(folder, error) from error

    def _restore(self) -> None:
        """Make the output folder again that somebody deleted or moved.

        Raises OSError where it cannot be written; CheckpointError if another run has it, which ends this one.
        """
        assert self._data is not None
        try:
            self._lock.enter_context(hold(self.plan.config.run.output_dir))
        except CheckpointError as error:
            raise error.__cause__ if isinstance(error.__cause__, OSError) else error from error
        write_run_files(self.plan, self._data.survey, self._data.estimate, self._resumed)

    def _start(self) -> Start:
        from vtrain.train.resume import find_start

        return self.processes.from_first(lambda: find_start(self.plan))

    def _is_done(self, start: Start, estimate: Estimate) -> bool:
        """Whether neither a step nor a video is left to make, so that nothing need be encoded or loaded."""
        step, validation = start.state.step, self.plan.validation
        if step < estimate.steps or start.folder is None:
            return False
        if step > estimate.steps or validation is None:
            return True
        output = self.plan.config.run.output_dir
        return not self.processes.from_first(lambda: validation_owed(output, step, due=True))

    def _read(self, found: Scan, estimate: Estimate) -> Generator[Event, None, Data]:
        """Fill the caches; without the clips that turned out bad in filling the run is estimated again."""
        filled = yield from self._caches(found)
        yield from self._quarantined()
        survey = found.survey
        if filled.skipped:
            survey = filled.recount(survey)
            estimate = self.processes.from_first(lambda: make_estimate(self.plan, survey))
            yield Estimated(estimate.steps, estimate.steps_per_epoch, estimate.samples_per_step, ())
            lost = len(found.samples) - len(filled.index)
            yield Noted(f"{lost} of {len(found.samples)} clips cannot be used; {len(filled.index)} remain")
        return Data(filled, survey, estimate)

    def _scanned(self, *, estimated: bool) -> Generator[Event, None, tuple[Scan, Estimate | None]]:
        """Look at every source file. estimated: also estimate the run, and check that there is room for it."""
        found, estimate = self.processes.from_first(
            lambda: scanned(self.plan) if estimated else (scan(self.plan), None)
        )
        for message in found.messages:
            yield Noted(message)
        yield Scanned(tuple(
            DatasetStatistics(
                each.id, each.files, sum(map(each.clips_of, each.samples)),
                {reason: count for reason, (count, _) in each.skipped.items()},
            )
            for each in found.survey.datasets
        ))  # fmt: skip
        if estimate is not None:
            words = tuple(sections(self.plan, found.survey, estimate)) if self.processes.first else ()
            yield Estimated(estimate.steps, estimate.steps_per_epoch, estimate.samples_per_step, words)
        return found, estimate

    def _caches(self, found: Scan) -> Generator[Event, None, FilledCaches]:
        """Encode what is missing, each process its share. Raises DataError."""
        from vtrain.data.caching import caches, pictures

        where = str(self.processes.device)
        with explained(self.plan, self.processes.device, "filling the caches"):
            try:
                filled = yield from caches.fill(self.plan, found.samples, extra_texts(self.plan), where, self.processes)
            except DataError:
                yield from self._quarantined()  # also where nothing is left to train on
                raise
            self.processes.from_first(lambda: pictures.fill_pictures(self.plan, where))
        copies, example = filled.index.copies()
        yield Filled(len(filled.index), filled.skipped, copies, tuple(example or ()))
        return filled

    def _quarantined(self) -> Iterator[Event]:
        """The first process moves what is bad, in datasets with on_bad_file = "move". Raises DataError on all."""
        alone = self.processes.count == 1  # then each file is an event as it goes
        moved = move_bad(self.plan) if alone else self.processes.from_first(lambda: list(move_bad(self.plan)))
        for each in moved:
            yield Quarantined(f"{each.dataset}/{each.ref_id}", each.reason, each.target, each.stays)

    @contextmanager
    def _assembled(self, start: Start, data: Data) -> Iterator[tuple[Trainer, Caches]]:
        """Everything loaded; let go again at the end, so that a process can do one run after another."""
        from vtrain.data.caching.caches import Caches
        from vtrain.train.assemble import assemble

        caches = Caches.open(self.plan)
        with uncollected(), explained(self.plan, self.processes.device, "loading the model"):
            trainer = assemble(self.plan, data.estimate, start, data.filled.index, caches, self.processes)
        try:
            yield trainer, caches
        finally:
            trainer.held.close()
            self.processes.let_go()

    def _begun(self, trainer: Trainer, data: Data) -> Iterator[Event]:
        """Make the output folder what the start says, now that everything has loaded. Raises CheckpointError if that fails."""
        from vtrain.train.settings import settings

        start, steps = trainer.start, data.estimate.steps
        yield from self.processes.from_first(lambda: self._opened(trainer, data))
        values = {key: setting.value for key, setting in settings(self.plan).items()}
        saved = self.processes.from_first(lambda: saved_states(start.folder))
        if self.processes.first:
            info = RunInfo(self.plan.config.run.name, str(self.plan.config.run.output_dir), values, start.state.step)
            self._listeners = Listeners(trackers(self.plan.config), info, saved)
        yield Started(self._recorder.session, start.state.step, steps, start.folder, values)

    def _opened(self, trainer: Trainer, data: Data) -> list[Noted | Warned]:
        """Open the records at the step that the run starts from; what is not as it was at the checkpoint."""
        start, changes = trainer.start, list(trainer.changes())
        if start.folder is not None:
            texts = [*start.changes, *start.warnings, *(each.text for each in changes)]
            self._resumed = {"checkpoint": str(start.folder), "step": start.state.step, "changes": texts}
        return [*changes, *open_records(self._recorder, self.plan, data.survey, data.estimate, start, self._resumed)]

    def _trained(self, trainer: Trainer, caches: Caches) -> Iterator[Event]:
        """Every step, with what is due between them."""
        failed, memory = FailedValidations(), MemoryReport(self.plan, self.processes.device)
        validate = self._validation(trainer, caches)
        full = explained(self.plan, self.processes.device, "training")
        with self._inbox.listening() if self._signals else nullcontext(), full:
            also: list[Piece] = [RecordsPiece(self._recorder.records)]
            also += [self._listeners.piece] if self._listeners is not None and self.plan.config.trackers else []
            owed = partial(validation_owed, self.plan.config.run.output_dir)
            for event in trainer.run(self._inbox, validate, also, owed):
                if isinstance(event, Ended):
                    # Of all alike: who stops because another was asked to has not finished either, as torchrun must know.
                    asked = self.processes.gathered([self._inbox.signal or 0]) if event.reason == "stopped" else [0]
                    self.signal = max(asked) or None
                    event = replace(event, signal=self.signal)
                yield failed.told(memory.seen(event))
                for complaint in self._inbox.complaints():
                    yield Warned(complaint)

    def _validation(self, trainer: Trainer, caches: Caches) -> Validation | None:
        made = self.plan.validation
        if made is None:
            return None
        from vtrain.data.caching.pictures import given
        from vtrain.validate.generate import Validation, Validator, weight_sets

        plan, processes = self.plan, self.processes
        autocast = partial(processes.autocast, cached=trainer.shares is None)
        # Who runs a shared denoiser stops together, or the others would wait for its blocks.
        stopping = (lambda: processes.any(self._inbox.stop)[0]) if trainer.shares else (lambda: self._inbox.stop)
        weights = weight_sets(plan.config.ema, None if trainer.average is None else trainer.average.in_place)
        validator = Validator(
            made, plan.family, plan.sampler, caches, trainer.predicting, processes.device, autocast, stopping,
            given(plan, caches), weights, trainer.resting, lambda: self._inbox.stop,
        )  # fmt: skip
        folder, full = plan.config.run.output_dir / SAMPLES, partial(explained, plan, processes.device, "validating")
        return Validation(validator, folder, processes, full, plan.config.parts(), trainer.shares is not None)
