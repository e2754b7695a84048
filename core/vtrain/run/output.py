"""What a run leaves on disk beside its checkpoints: its folder, one run's at a time; its configuration and plan; its events.

metrics.jsonl has a line for each optimizer step, events.jsonl one for each other event. The recorder is part of the run,
not a listener: lines are on the disk before anybody else hears of the event, and before the checkpoint of that step. Both
files are cut back to the checkpoint when a run is resumed, so that a step stands in them once.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from vtrain.contract import (
    CheckpointError,
    Ended,
    Event,
    Filling,
    Generating,
    Logged,
    Problem,
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
from vtrain.plan.records import Plan
from vtrain.train.resume import settings

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


def write_run_files(plan: Plan, survey: Survey, estimate: Estimate) -> None:
    """config.toml, verbatim, and plan.json: resolved values, parts with their versions, fingerprints. Raises OSError."""
    output = plan.config.run.output_dir
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.toml").write_text(plan.config.text, encoding="utf-8")
    hash_file = FileHashes(plan.config.cache.dir / HASHES)
    fingerprints = {
        "text": plan.family.text_fingerprint(hash_file),
        "video": plan.family.video_fingerprint(hash_file),
        "config": hashlib.sha256(plan.config.text.encode()).hexdigest(),
        **{
            f"features ({name})": part.feature_fingerprint(hash_file)
            for name, part in plan.regularizers
            if part.needs().features == "cached" and isinstance(part, SupportsFeatures)
        },
    }
    whole = {
        **render.as_json(plan, survey, estimate),
        "settings": {key: setting.value for key, setting in settings(plan).items()},
        "fingerprints": fingerprints,
    }
    (output / "plan.json").write_text(json.dumps(whole, indent=2), encoding="utf-8")


METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


class Recorder:
    """Writes a run's events into its output folder. Until `begin` they are kept: a run that never starts leaves nothing.

    session: how often the folder was started, this time counted; 0 until `begin`.
    """

    def __init__(self, folder: Path, restore: Callable[[], None] = lambda: None) -> None:
        """restore: called when the folder went away under the run; makes it again."""
        self._folder, self._restore = folder, restore
        self.session = 0
        self._lines: list[dict[str, Any]] = []
        self._steps: tuple[StepMetrics, ...] = ()
        self._held: tuple[int, int] | None = None

    def begin(self, step: int) -> int:
        """Cut both files back to `step` and open a session. Gives how many later steps were cut off. Raises OSError."""
        dropped = cut_back(self._folder / METRICS, lambda line: int(line["step"]) <= step)
        sessions = [0]

        def kept(line: Mapping[str, Any]) -> bool:
            sessions.append(int(line["session"]))
            return int(line.get("step", 0)) <= step

        cut_back(self._folder / EVENTS, kept)
        self.session = max(sessions) + 1
        self._held = _identity(self._folder)
        return dropped

    def record(self, event: Event) -> Iterator[Warned]:
        """Write an event down. A file that cannot be written is warned of, its lines kept for the next time."""
        # A line a step would repeat metrics.jsonl; one a clip or a solver step is noise.
        if isinstance(event, Stepped | Filling | Generating):
            return
        if isinstance(event, Logged):
            self._steps += event.steps
        else:
            self._lines.append({"time": round(time.time(), 3), **as_json(event)})
        if not self.session:
            return
        try:
            # Another folder of that name is not the one that this run holds, with its files in it.
            if not self._folder.is_dir() or _identity(self._folder) != self._held:
                yield Warned(f"the output folder went away and is made again: {self._folder}")
                self._restore()
                self._held = _identity(self._folder)
            if self._steps:
                # On the disk before the checkpoint of that step, from which a resumed run starts.
                append(self._folder / METRICS, (asdict(each) for each in self._steps), durable=True)
                self._steps = ()
            if self._lines:
                heading = {"version": VERSION, "session": self.session}
                append(self._folder / EVENTS, ({**heading, **line} for line in self._lines), durable=False)
                self._lines = []
        except OSError as error:
            kind = "metrics" if isinstance(event, Logged) else "events"
            yield Warned(f"{kind} could not be written and are kept for the next time: {error}")


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
        except (ValueError, KeyError, TypeError, AttributeError):  # a line that a killed run did not end
            continue
    return owed


class FailedValidations:
    """Those of a session that failed, for its end."""

    def __init__(self) -> None:
        self._steps: dict[int, tuple[str, ...]] = {}
        self._last = False

    def look(self, event: Validated) -> None:
        """One that was interrupted without a failure is made when the run resumes."""
        if event.failures:
            self._steps[event.step] = event.failures
        elif not event.interrupted:
            self._steps.pop(event.step, None)
        self._last = bool(event.failures)

    def told(self, event: Ended) -> Ended:
        return replace(event, failed_validations=dict(self._steps), last_validation_failed=self._last)


def append(path: Path, records: Iterable[Mapping[str, Any]], *, durable: bool) -> None:
    """Add a line for each record. durable: synced to the disk. Raises OSError, the file then being as it was."""
    data = memoryview("".join(json.dumps(record) + "\n" for record in records).encode())
    # Without a buffer: what it still held would be written when the file is closed, after the truncation.
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            # What was written of a line would run into the next one.
            os.truncate(path, before)
            raise


def cut_back(path: Path, kept: Callable[[Mapping[str, Any]], bool]) -> int:
    """Drop the lines that are not to be kept, and torn ones. Gives how many whole lines were dropped. Raises OSError."""
    if not path.exists():
        return 0
    lines, dropped = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            keep = kept(json.loads(line))
        except (ValueError, KeyError, TypeError):  # a line that a killed run did not end
            continue
        if keep:
            lines.append(line if line.endswith("\n") else line + "\n")
        else:
            dropped += 1
    # Aside, then renamed: a crash leaves the old file or the new one.
    aside = path.with_suffix(".jsonl.partial")
    aside.write_text("".join(lines), encoding="utf-8")
    aside.replace(path)
    return dropped
