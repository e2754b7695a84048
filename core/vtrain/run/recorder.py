"""What a run leaves of its events: metrics.jsonl, a line for each optimizer step, and events.jsonl, a line for each other.

Part of the run, not a listener: lines are on the disk before anybody else hears of the event, and before the checkpoint of
that step. Both files are cut back to the checkpoint when a run is resumed, so that a step stands in them once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vtrain.contract import Event, Filling, Logged, StepMetrics, Stepped, Warned
from vtrain.contract.events import VERSION, as_json

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

    def begin(self, step: int) -> int:
        """Cut both files back to `step` and open a session. Gives how many later steps were cut off. Raises OSError."""
        dropped = cut_back(self._folder / METRICS, lambda line: int(line["step"]) <= step)
        sessions = [0]

        def kept(line: Mapping[str, Any]) -> bool:
            sessions.append(int(line["session"]))
            return int(line.get("step", 0)) <= step

        cut_back(self._folder / EVENTS, kept)
        self.session = max(sessions) + 1
        return dropped

    def record(self, event: Event) -> Iterator[Warned]:
        """Write an event down. A file that cannot be written is warned of, its lines kept for the next time."""
        if isinstance(event, Stepped | Filling):  # a line a step would repeat metrics.jsonl, one a clip is noise
            return
        if isinstance(event, Logged):
            self._steps += event.steps
        else:
            self._lines.append({"time": round(time.time(), 3), **as_json(event)})
        if not self.session:
            return
        try:
            if not self._folder.is_dir():
                yield Warned(f"the output folder went away and is made again: {self._folder}")
                self._restore()
            if isinstance(event, Logged):
                append(self._folder / METRICS, (asdict(each) for each in self._steps), durable=True)
                self._steps = ()
            if self._lines:
                heading = {"version": VERSION, "session": self.session}
                append(self._folder / EVENTS, ({**heading, **line} for line in self._lines), durable=False)
                self._lines = []
        except OSError as error:
            kind = "metrics" if isinstance(event, Logged) else "events"
            yield Warned(f"{kind} could not be written and are kept for the next time: {error}")


def append(path: Path, records: Iterable[Mapping[str, Any]], *, durable: bool) -> None:
    """Add a line for each record. durable: synced to the disk. Raises OSError, the file then being as it was."""
    with path.open("ab") as file:
        before = file.tell()
        try:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
            file.flush()
            if durable:
                os.fsync(file.fileno())
        except OSError:
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
        except (ValueError, KeyError, TypeError):
            continue
        if keep:
            lines.append(line if line.endswith("\n") else line + "\n")
        else:
            dropped += 1
    aside = path.with_suffix(".jsonl.partial")
    aside.write_text("".join(lines), encoding="utf-8")
    aside.replace(path)
    return dropped
