"""What people see of a run: its events as lines, with a live bar on a terminal."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from vtrain.cli.live import FillingLines, TrainingLines
from vtrain.cli.plan import show_sections
from vtrain.cli.report import folded, one_line
from vtrain.contract import (
    Ended,
    Estimated,
    Event,
    Filled,
    Filling,
    Generating,
    Logged,
    LossSpike,
    Noted,
    Planned,
    Quarantined,
    Saved,
    Started,
    Stepped,
    StepSkipped,
    Validated,
    Validating,
    Warned,
)
from vtrain.estimate.memory import gib
from vtrain.estimate.render import counted

if TYPE_CHECKING:
    from vtrain.run.session import Session

KEPT = "interrupted; what is cached or saved is whole"
SAME = "the same command resumes"
NEWEST = 3
"""Steps that are named of failed validations."""
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
        self._step: float | None = None
        self._stepped: float | None = None
        self._save: float | None = None
        self.again = SAME

    def mute(self) -> None:
        """Nobody reads any more: say nothing from here on."""
        self._quiet = self.console.quiet = True

    def heard(self) -> None:
        """A signal that asks to stop: said at once, for the step may take a while."""
        with suppress(OSError):  # SIGHUP comes when the terminal is gone, and training must not end in here
            known = [f"a step takes {_about(self._step)}"] if self._step is not None else []
            known += [f"the last checkpoint took {_about(self._save)} to write"] if self._save else []
            self.say("stopping; what is done will be saved" + (f" ({', '.join(known)})" if known else ""))

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
            case Stepped() | Logged() | Generating() if self._training is not None:
                if isinstance(event, Stepped):
                    before, self._stepped = self._stepped, time.monotonic()
                    self._step = None if before is None else self._stepped - before
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
                self._training = TrainingLines(self.console, event.steps, event.step)
            case Saved():
                self._save = event.seconds
                self.say(f"saved {event.folder}" + (f", {len(event.deleted)} older deleted" if event.deleted else ""))
            case Validating():
                self.say(f"validating: {counted(event.videos, 'video')}")
            case Validated():
                self._validated(event)
            case Warned() | LossSpike() | StepSkipped():
                self._warn(event.text)
            case Noted():
                self.say(event.text)
            case Ended():
                self._stop_bars()
                self.say(_ending(event, self.again))
                self.say(f"output: {self._output}")
                if event.peak_memory is not None:
                    self.say(_memory(event))
                for text in failed_validations(event):
                    self._warn(text)

    def say(self, text: str, style: str | None = None) -> None:
        """A line, on a terminal as many as it takes."""
        width = self.console.width if self.console.is_terminal else None
        lines = folded(one_line(text), width, rest="  ")
        self.console.print(escape("\n".join(lines)), style=style, soft_wrap=True)

    def _warn(self, text: str) -> None:
        self.say(f"WARNING: {text}", style="bold red")

    def _stop_bars(self) -> None:
        self._sum_up_moved()
        self._filling.stop()
        if self._training is not None:
            self._training.stop()

    def _filled(self, event: Filled) -> None:
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
        if self._training is not None:
            self._training.show_numbers()
        for path in (*event.files.values(), event.sheet):
            if path is not None:
                self.say(f"wrote {path}")
        for failure in event.failures:
            self._warn(f"validation at step {event.step} failed: {failure}")
        if event.interrupted:
            self.say(f"validation at step {event.step} stopped; it is made when the run resumes")


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


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


def _memory(event: Ended) -> str:
    """The peak of training's steps beside the estimate."""
    assert event.peak_memory is not None
    estimated = f", estimated {gib(event.estimated_memory)} GiB" if event.estimated_memory else ", not estimated"
    return f"memory of a step: at most {gib(event.peak_memory)} GiB{estimated}"


def failed_validations(event: Ended) -> Iterator[str]:
    """Those of the session that failed, told again at its end: a reason at a time, the last steps first."""
    steps: dict[str, list[int]] = {}
    for step in sorted(event.failed_validations, reverse=True):
        for reason in event.failed_validations[step]:
            steps.setdefault(reason, []).append(step)
    for reason, failed in list(steps.items())[:REASONS]:
        more = f" and {len(failed) - NEWEST} before" if len(failed) > NEWEST else ""
        at = f"step{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed[:NEWEST]))}{more}"
        yield f"validation at {at} failed: {reason}"
    if len(steps) > REASONS:
        yield f"{len(steps) - REASONS} more of them: events.jsonl in the output folder has all"
    if event.last_validation_failed and event.reason == "finished":
        yield f"the same command makes the videos of step {event.step} again"


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
