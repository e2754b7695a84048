"""What people see of a run: its events as lines, with a live bar on a terminal."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vtrain.cli.plan import show_sections
from vtrain.cli.report import one_line
from vtrain.contract import (
    Ended,
    Estimated,
    Event,
    Filled,
    Filling,
    Logged,
    Noted,
    Planned,
    Quarantined,
    Saved,
    Started,
    StepMetrics,
    Stepped,
    Validated,
    Validating,
    Warned,
)
from vtrain.estimate.estimate import bytes_text
from vtrain.estimate.render import counted

if TYPE_CHECKING:
    from vtrain.run.session import Session

KEPT = "interrupted; what is cached or saved is whole"
SAME = "the same command resumes"
WIDE = 120
"""Letters of a terminal's line from which on a bar and a clock stand beside the numbers."""
NAMED, REASONS = 20, 10
"""Files that are shown by name, and reasons that are shown with their number, where there are more."""


class _Console(Console):
    """rich's own ends the process where nobody reads any more, which would lose what was trained."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Terminal:
    """Shows the events of a session. Silent on processes beside the first."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        """console: where it is shown; else standard output. again: how to resume the run."""
        self._quiet = quiet
        self.console = console or _Console(quiet=quiet, soft_wrap=True, highlight=False)
        self._filling = FillingLines(self.console)
        self._training: TrainingLines | None = None
        self._moved = Counter[bool]()
        self._output = Path()
        self.again = SAME

    def mute(self) -> None:
        """Nobody reads any more: say nothing from here on."""
        self._quiet = self.console.quiet = True

    def heard(self) -> None:
        """A signal that asks to stop: said at once, for the step may take a while."""
        with suppress(OSError):  # SIGHUP comes when the terminal is gone, and training must not end in here
            self.say("stopping after this step; what is done will be saved")

    @contextmanager
    def following(self, session: Session) -> Iterator[None]:
        """For the length of a session: live bars end with it, and a Ctrl-C says what is kept."""
        self.console.quiet = self._quiet or not session.processes.first
        self._filling.processes = session.processes.count
        try:
            yield
        except KeyboardInterrupt:
            self._stop_bars()
            self.say(f"{KEPT}; {self.again}")
            raise
        finally:
            self._stop_bars()

    def show(self, event: Event) -> None:
        """One event. Scanned says nothing that is not in the plan's words."""
        if not isinstance(event, Quarantined):
            self._sum_up_moved()
        match event:
            case Planned():
                self._output = event.output_dir
            case Filling():
                self._filling.show(event)
            case Stepped() | Logged() if self._training is not None:
                self._training.show(event)
            case Estimated():
                show_sections(self.console, event.sections)
            case Filled():
                self._filling.stop()
                self._filled(event)
            case Quarantined():
                self._quarantined(event)
            case Started():
                self.again = _again(str(event.settings.get("run.resume", "latest")))
                if event.step < event.steps:
                    self._training = TrainingLines(self.console, event.steps, event.step)
            case Saved():
                self.say(f"saved {event.folder}" + (f", {len(event.deleted)} older deleted" if event.deleted else ""))
            case Validating():
                self.say(f"validating: {counted(event.videos, 'video')}")
            case Validated():
                self._validated(event)
            case Warned():
                self._warn(event.text)
            case Noted():
                self.say(event.text)
            case Ended():
                self._stop_bars()
                self.say(_ending(event, self.again))
                self.say(f"output: {self._output}")

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(escape(one_line(text)), style=style)

    def _warn(self, text: str) -> None:
        self.say(f"WARNING: {text}", style="bold red")

    def _stop_bars(self) -> None:
        self._sum_up_moved()
        self._filling.stop()
        if self._training is not None:
            self._training.stop()

    def _filled(self, event: Filled) -> None:
        if event.truncated:
            self.say(f"{counted(event.truncated, 'caption')} cut off at the text encoder's limit")
        if event.duplicate_example:
            example = " and ".join(event.duplicate_example)
            self.say(f"{counted(event.duplicates, 'sample')} with the same bytes as another (such as {example})")
        for line in excluded(event.excluded):
            self.say(line)

    def _quarantined(self, event: Quarantined) -> None:
        self._moved[event.target is not None] += 1
        if event.target is None:
            self.say(f"not moved: {event.file}: {event.stays} ({event.reason})")
        else:
            self.say(f"moved: {event.file} -> {event.target} ({event.reason})")

    def _sum_up_moved(self) -> None:
        """After the last of them: how many there were."""
        if self._moved:
            self.say(
                f"{self._moved[True]} bad files moved" + (f", {self._moved[False]} not" if self._moved[False] else "")
            )
            self._moved.clear()

    def _validated(self, event: Validated) -> None:
        for path in (*event.files.values(), event.sheet):
            if path is not None:
                self.say(f"wrote {path}")
        for failure in event.failures:
            self._warn(f"validation at step {event.step} failed: {failure}")
        if event.interrupted:
            self.say(f"validation at step {event.step} stopped; it is made when the run resumes")


def _again(resume: str) -> str:
    """How to resume a run that has begun. resume: its [run].resume."""
    if resume == "latest":
        return SAME
    same = "" if resume == "never" else f" (the same command starts again from {resume})"
    return f'to resume, set run.resume = "latest"{same}'


def _ending(event: Ended, again: str) -> str:
    if event.reason == "stopped":
        return f"step {event.step} of {event.steps}: stopped as asked; {again}"
    if event.reason == "nothing to do":
        return f"nothing to do: train.steps is {event.steps} and the checkpoint is at {event.step}"
    return f"step {event.step} of {event.steps}: all steps are done"


def excluded(files: Mapping[str, str]) -> Iterator[str]:
    """Files that could not be decoded or encoded: by name, and where they are many, how many there are of each reason.

    files: file -> why.
    """
    named = sorted(files.items())
    for file, reason in named[:NAMED]:
        yield f"skipped: {file}: {reason}"
    if len(named) > NAMED:
        yield f"skipped: {len(named) - NAMED} more; `vtrain data list CONFIG --failed` names them. Reasons of all:"
        for reason, count in Counter(files.values()).most_common(REASONS):
            yield f"  {count}  {reason}"


def numbers(row: StepMetrics, steps: int, seconds: float, width: int | None = None) -> str:
    """One line: loss, what it is made of, learning rate, gradient norm, s/step, training time left, memory.

    seconds: smoothed, per step. The share of the step in which it waited for its data is shown where it is 1% or more.
    width: letters that there is room for; what matters least goes first.
    """
    waiting = row.data_wait >= 0.01 * row.seconds > 0
    terms = {"flow_loss": row.flow_loss, **row.terms} if row.terms else {}
    # (what is shown, how soon it goes where room is short)
    parts = [(f"loss {row.loss:.4f}", 0)]
    parts += [(f"{name} {value:.4g}", 5) for name, value in terms.items()]
    parts.append((f"lr {row.lr:.2e}", 3))
    parts += [(f"norm {row.grad_norm:.3g}", 4)] if row.grad_norm is not None else []
    parts.append((f"{seconds:.3g} s/step", 2))
    parts += [(f"waiting for data {row.data_wait / row.seconds:.0%}", 4)] if waiting else []
    parts.append((f"left {timedelta(seconds=round((steps - row.step) * seconds))}", 1))
    parts.append((f"memory {bytes_text(row.memory)}", 6))
    while width is not None and len(parts) > 1 and len("  ".join(text for text, _ in parts)) > width:
        parts.remove(max(reversed(parts), key=lambda part: part[1]))
    return "  ".join(text for text, _ in parts)


class TrainingLines:
    """How training goes: a bar with the newest numbers on a terminal, a line for each reading elsewhere."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self._console, self._steps = console, steps
        self._pace: float | None = None
        self._room = 0
        self._bar: Progress | None = None
        if console.is_terminal:
            # rich would shorten the counter and the clock first.
            self._room = console.width - len("step ") - 2 * len(str(steps)) - len("/ ")
            bar = (BarColumn(bar_width=24), TimeElapsedColumn()) if console.width >= WIDE else ()
            self._room -= len("0:00:00 ") + 25 if bar else 0
            columns = (TextColumn("step"), MofNCompleteColumn(), *bar, TextColumn("{task.fields[numbers]}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(
                "step", total=steps, completed=done, numbers="waiting for the first numbers"
            )
            self._bar.start()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: Stepped | Logged) -> None:
        """A step's numbers come later than the step. The pace is smoothed so that the time left does not jump."""
        if isinstance(event, Stepped):
            if self._bar is not None:
                self._bar.update(self._task, completed=event.step)
            return
        newest = event.steps[-1]
        self._pace = newest.seconds if self._pace is None else 0.7 * self._pace + 0.3 * newest.seconds
        text = numbers(newest, self._steps, self._pace, self._room if self._bar is not None else None)
        if self._bar is not None:
            self._bar.update(self._task, completed=newest.step, numbers=escape(text))
        else:
            self._console.print(escape(f"step {newest.step}/{self._steps}  {text}"))


class FillingLines:
    """How the caches fill: a bar a stage on a terminal; elsewhere a line at the start, at the end, and now and then.

    processes: that fill together, each its share; the first shows its own.
    """

    LINE_EVERY = 30.0
    UNITS: ClassVar = {"text": "captions", "mask": "masks"}
    """Of each stage; of all others, clips."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.processes = 1
        self.paces: dict[str, Pace] = {}
        self.said = 0.0
        columns = (
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[pace]}"),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.tasks: dict[str, TaskID] = {}

    def stop(self) -> None:
        self.bar.stop()

    def show(self, now: Filling) -> None:
        """The first of a stage says what was there."""
        self.bar.start()
        stage, total, over = now.stage, now.total, now.done + now.unusable
        if stage not in self.paces:
            self.paces[stage] = Pace(over, time.monotonic())
            self.say(f"{stage}: {now.done} of {total} cached{_to_do(now)}{self._whose()}")
            if over < total:
                words = escape(f"encoding {stage}")
                self.tasks[stage] = self.bar.add_task(words, total=total, completed=over, pace="")
            return
        pace = self.paces[stage].words(over, total, time.monotonic(), self.UNITS.get(stage, "clips"))
        self.bar.update(self.tasks[stage], completed=over, pace=escape(pace))
        late = time.monotonic() - self.said > self.LINE_EVERY
        if over == total or (late and not self.console.is_terminal):
            there = now.done - now.made > self.paces[stage].found
            made = f", {now.made} of them encoded now" if over == total and there else ""
            unusable = f", {now.unusable} cannot be used" if now.unusable else ""
            if made or unusable or not self.console.is_terminal:
                self.say(f"{stage}: {now.done} of {total} cached{made}{unusable}  {pace}")

    def _whose(self) -> str:
        return f" (the first process's share of {self.processes})" if self.processes > 1 else ""

    def say(self, text: str) -> None:
        self.said = time.monotonic()
        self.console.print(escape(text))


def _to_do(now: Filling) -> str:
    """A file whose bytes are not known yet (it is new, or was touched, or the ledger was lost) may be cached all the same."""
    known = now.total - now.done - now.unread
    return (f", {known} to do" if known else "") + (f", {now.unread} to read or encode" if now.unread else "")


@dataclass(frozen=True)
class Pace:
    """How fast something goes. found: what was there at the start; began: when that was, in seconds."""

    found: int
    began: float

    def words(self, done: int, total: int, now: float, unit: str) -> str:
        """ "0.51 clips/s  left 0:12:03", or at the end "0.51 clips/s  in 0:12:03"."""
        seconds = now - self.began
        if done == self.found or seconds <= 0:
            return ""
        rate = (done - self.found) / seconds
        when = (
            f"in {timedelta(seconds=round(seconds))}"
            if done == total
            else f"left {timedelta(seconds=round((total - done) / rate))}"
        )
        return f"{rate:.3g} {unit}/s  {when}"
