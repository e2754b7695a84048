"""What a run leaves on disk beside its checkpoints: its folder, one run's at a time; its configuration and plan; its events.

metrics.jsonl has a line for each optimizer step, events.jsonl one for each other event. The recorder is part of the run,
not a listener: lines are on the disk before anybody else hears of the event, and before the checkpoint of that step. Both
files are cut back to the checkpoint when a run is resumed, so that a step stands in them once. The checkpoint says how many
lines they had and what these said, so that what became of them since is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from vtrain.config.keys import key_text
from vtrain.config.record import Config
from vtrain.contract import (
    CheckpointError,
    Ended,
    Event,
    Filling,
    Generating,
    Logged,
    Noted,
    Problem,
    Saved,
    StepMetrics,
    Stepped,
    SupportsFeatures,
    Validated,
    Warned,
)
from vtrain.contract.events import VERSION, as_json
from vtrain.data.caching.sharing import lock
from vtrain.data.scanning.database import HASHES, FileHashes
from vtrain.data.scanning.surveys import Survey
from vtrain.estimate import render
from vtrain.estimate.estimate import Estimate
from vtrain.estimate.render import counted
from vtrain.plan.places import CHECKPOINTS, CONFIG, EVENTS, METRICS, PLAN, written_folders
from vtrain.plan.records import Plan
from vtrain.plan.text import text_marks
from vtrain.run.alike import SEEN
from vtrain.run.lines import UNREAD, Chain, Link, Records, append, cut_back, gaps, whole
from vtrain.train import checkpoint
from vtrain.train.resume import Start, condition_marks
from vtrain.train.settings import settings

FILE = ".lock"
"""Holds who has the folder. It stays when a run ends: that it is there means nothing, that it is locked does."""

_PLACE = 1 << 20
"""Of the locked byte, behind the end of the text, which must stay readable where locked bytes are not."""


@contextmanager
def hold(folder: Path) -> Iterator[str]:
    """Have the output folder for this process, and make it; gives a warning, "" for none.

    Raises CheckpointError if another run has it, or if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Opened without truncation: whoever is refused reads in it who has the folder.
        file = (folder / FILE).open("a+b", buffering=0)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        outcome = lock(file, _PLACE)
        if outcome == "taken":
            raise CheckpointError(
                Problem(
                    str(folder),
                    f"another run has this output folder: {_holder(file)}.",
                    "Let it finish or stop it, or choose another run.output_dir.",
                )
            )
        if outcome == "ours":
            try:
                _sign(file)
            except OSError as error:
                raise _unwritable(folder, error) from error
            yield ""
        else:
            yield f"{folder} is on a file system without locks: make sure that no other run uses it"


def _identity(folder: Path) -> tuple[int, int] | None:
    """Of the lock in a folder: its device and number there, None where there is none."""
    try:
        found = (folder / FILE).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _sign(file: BinaryIO) -> None:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    file.truncate(0)
    file.write(text.encode() + b"\n")


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(Problem(str(folder), f"the output folder cannot be written: {error}."))


def _holder(file: BinaryIO) -> str:
    """ "process 7 on host, since ..."; what another process wrote may be missing for a moment."""
    file.seek(0)
    try:
        found = json.loads(file.read())
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has just begun"


def try_writing(config: Config) -> None:
    """Write a file and delete it, wherever the run will write: rights do not tell of a full disk, a quota, a broken share.

    Raises CheckpointError with all places where it fails.
    """
    problems = {}
    for key, folder in written_folders(config):
        place = next(each for each in (folder, *folder.parents) if each.exists())
        try:
            with TemporaryFile(dir=place) as file:  # without a name, where the system can: nothing of it stays
                file.write(b"-")
                os.fsync(file.fileno())
        except OSError as error:
            what = f"nothing can be written there: {error.strerror or error}."
            problems[key, place] = Problem(str(place), what, f"Set {key_text(key)} to another folder, or free space.")
    if problems:
        raise CheckpointError(problems.values())


@contextmanager
def occupied(config: Config) -> Iterator[str]:
    """The output folder, held as by `hold`, once everything that the run will write can be. Raises CheckpointError.

    What a killed run had not finished writing or deleting goes.
    """
    try_writing(config)
    with hold(config.run.output_dir) as warning:
        checkpoint.sweep(config.run.output_dir / CHECKPOINTS)
        for left in config.run.output_dir.glob(f"{SEEN}*"):
            with suppress(OSError):
                left.unlink()
        yield warning


def write_run_files(plan: Plan, survey: Survey, estimate: Estimate, resumed: Mapping[str, Any] | None = None) -> None:
    """config.toml, verbatim, and plan.json: resolved values, parts with their versions, fingerprints. Raises OSError.

    resumed: what the run resumes from and what changed since; None for a new run.
    """
    output = plan.config.run.output_dir
    output.mkdir(parents=True, exist_ok=True)
    put(output / CONFIG, plan.config.text)
    hash_file = FileHashes(plan.config.cache.dir / HASHES)
    fingerprints = {
        **text_marks(plan.family, hash_file),
        "video": plan.family.video_fingerprint(hash_file),
        "config": hashlib.sha256(plan.config.text.encode()).hexdigest(),
        **{
            f"features ({name})": part.feature_fingerprint(hash_file)
            for name, part in plan.regularizers
            if part.needs().features == "cached" and isinstance(part, SupportsFeatures)
        },
        **condition_marks(plan, hash_file),
    }
    whole = {
        **render.as_json(plan, survey, estimate),
        "settings": {key: setting.value for key, setting in settings(plan).items()},
        "fingerprints": fingerprints,
        "resumed": resumed,
    }
    put(output / PLAN, json.dumps(whole, indent=2))


def put(file: Path, text: str) -> None:
    """Write a file aside, then rename it: a crash leaves the old one or the new one. Raises OSError."""
    aside = file.with_name(f".{file.name}.partial")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


class Recorder:
    """Writes a run's events into its output folder. Until `begin` they are kept: a run that never starts leaves nothing.

    session: how often the folder was started, this time counted; 0 until `begin`. chains: of each file, what it says. before: the
    checkpoint that was saved last, or that the run goes on from.
    """

    def __init__(self, folder: Path, restore: Callable[[], None] = lambda: None) -> None:
        """restore: called when the folder went away under the run; makes it again."""
        self._folder, self._restore = folder, restore
        self.session = 0
        self.chains = {METRICS: Chain(), EVENTS: Chain()}
        self.before: Link | None = None
        self._lines: list[dict[str, Any]] = []
        self._steps: tuple[StepMetrics, ...] = ()
        self._held: tuple[int, int] | None = None

    def begin(self, step: int, before: Records | None = None, *, whole_file: bool = True) -> tuple[int, list[str]]:
        """Cut both files back to `step` and open a session. Raises OSError.

        Gives how many later steps were cut off, and what is wrong with the files. before: what the checkpoint says of them.
        whole_file: whether all steps to `step` should be there where no checkpoint says how many were.
        """
        known = before.files if before is not None else {}
        steps, sessions = [0], [before.session if before is not None else 0]

        def kept_step(line: Mapping[str, Any]) -> bool:
            found = whole(line["step"], least=1)
            if found <= step:
                if found <= steps[-1]:
                    raise ValueError("a step that is there already")
                steps.append(found)
            return found <= step

        def kept_event(line: Mapping[str, Any]) -> bool:
            sessions.append(whole(line["session"], least=1))
            return whole(line.get("step", 0)) <= step

        metrics = cut_back(self._folder / METRICS, kept_step, self.chains[METRICS], known.get(METRICS))
        events = cut_back(self._folder / EVENTS, kept_event, self.chains[EVENTS], known.get(EVENTS))
        expected = step * whole_file
        if before is not None and METRICS in known:
            expected = known[METRICS].lines + before.unwritten
        missing = gaps(steps, step) if len(steps) - 1 < expected else ""
        faults = [f"{METRICS} lacks {missing}"] if missing else []
        faults += [*metrics.faults(METRICS, told=bool(missing)), *events.faults(EVENTS)]
        self.session = max(sessions) + 1
        self._held = _identity(self._folder)
        return metrics.dropped, faults

    def records(self) -> Records:
        """What the next checkpoint says of the files."""
        files = {name: chain.written() for name, chain in self.chains.items()}
        return Records(session=self.session, files=files, before=self.before, unwritten=len(self._steps))

    def check_written(self) -> None:
        """Raises CheckpointError where lines could not be written to the last: there is no next time."""
        lost = {METRICS: len(self._steps), EVENTS: len(self._lines)} if self.session else {}
        what = [f"{counted(count, 'line')} of {name}" for name, count in lost.items() if count]
        if what:
            remedy = "The checkpoints that were saved are whole. Make room on the disk before the next run."
            raise CheckpointError(Problem(str(self._folder), f"{' and '.join(what)} could not be written.", remedy))

    def record(self, event: Event) -> Iterator[Warned]:
        """Write an event down. A file that cannot be written is warned of, its lines kept for the next time; not so the other."""
        # A line a step would repeat metrics.jsonl; one a clip or a solver step is noise.
        if isinstance(event, Stepped | Filling | Generating):
            return
        if isinstance(event, Saved):
            with suppress(OSError):  # somebody took it away at once
                self.before = Link.to(event.step, event.folder)
        if isinstance(event, Logged):
            self._steps += event.steps
        else:
            self._lines.append({"time": round(time.time(), 3), **as_json(event)})
        if not self.session:
            return
        kind = "metrics" if isinstance(event, Logged) else "events"
        failed: dict[str, OSError] = {}
        try:
            # Another folder of that name is not the one that this run holds, with its files in it.
            if not self._folder.is_dir() or _identity(self._folder) != self._held:
                yield Warned(f"the output folder went away and is made again: {self._folder}")
                self._restore()
                self._held = _identity(self._folder)
        except OSError as error:
            failed[kind] = error
        else:
            for name, write in (("metrics", self._write_steps), ("events", self._write_lines)):
                try:
                    write()
                except OSError as error:
                    failed[name] = error
        if kind in failed:
            yield Warned(f"{kind} could not be written and are kept for the next time: {failed[kind]}")

    def _write_steps(self) -> None:
        if self._steps:
            # On the disk before the checkpoint of that step, from which a resumed run starts.
            self._append(METRICS, [asdict(each) for each in self._steps], durable=True)
            self._steps = ()

    def _write_lines(self) -> None:
        if self._lines:
            heading = {"version": VERSION, "session": self.session}
            self._append(EVENTS, [{**heading, **line} for line in self._lines], durable=False)
            self._lines = []

    def _append(self, name: str, lines: list[dict[str, Any]], *, durable: bool) -> None:
        append(self._folder / name, lines, durable=durable)
        for line in lines:
            self.chains[name].add(line)


def open_records(
    recorder: Recorder, plan: Plan, survey: Survey, estimate: Estimate, start: Start, resumed: Mapping[str, Any] | None
) -> list[Noted | Warned]:
    """Begin a session where the run starts; what was said of later steps goes, and later checkpoints are renamed.

    resumed: as `write_run_files` has it; what is wrong with the records is added. Raises CheckpointError.
    """
    output, step = plan.config.run.output_dir, start.state.step
    checkpoints = output / CHECKPOINTS
    own = start.folder is not None and start.folder.parent.resolve() == checkpoints.resolve()
    before = Records.read(start.folder) if own else None
    told: list[Noted | Warned] = []
    try:
        # First: killed behind it, there is no checkpoint of steps that are cut from the records.
        later = checkpoint.set_aside(checkpoints, step)
        dropped, faults = recorder.begin(step, before, whole_file=own)
        recorder.before = None if start.folder is None else Link.to(step, start.folder)
        more = {"changes": [*resumed["changes"], *faults]} if resumed is not None else {}
        write_run_files(plan, survey, estimate, None if resumed is None else {**resumed, **more})
        told += [Noted(f"a later checkpoint was renamed to {folder}") for folder in later]
    except OSError as error:
        raise _unwritable(output, error) from error
    if dropped:
        told.append(Noted(f"{counted(dropped, 'later step')} {'was' if dropped == 1 else 'were'} cut from {METRICS}"))
    if start.folder is not None and not own:
        told.append(Noted(f"{METRICS} begins at step {step + 1}; earlier steps are beside {start.folder.parent}"))
    return told + [Warned(fault) for fault in faults]


def validation_owed(folder: Path, step: int, due: bool) -> bool:
    """Whether a validation after `step` is still to be made, by what events.jsonl says: one that was begun and not ended, one
    that failed, or one that is due there and was not begun. Where nothing was recorded, none."""
    if not (folder / EVENTS).exists():
        return False
    owed = due
    for line in (folder / EVENTS).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record.get("step") == step and record["event"] in ("validating", "validated"):
                owed = record["event"] == "validating" or bool(record["interrupted"] or record["failures"])
        except UNREAD:  # a line that a killed run did not end
            continue
    return owed


class FailedValidations:
    """Those of a session that failed, for its end."""

    def __init__(self) -> None:
        self._steps: dict[int, tuple[str, ...]] = {}
        self._last = False

    def told(self, event: Event) -> Event:
        """The event; an end with what failed before it. One that was interrupted without a failure is made when the run resumes."""
        if isinstance(event, Ended):
            return replace(event, failed_validations=dict(self._steps), last_validation_failed=self._last)
        if isinstance(event, Validated):
            if event.failures:
                self._steps[event.step] = event.failures
            elif not event.interrupted:
                self._steps.pop(event.step, None)
            self._last = bool(event.failures)
        return event
