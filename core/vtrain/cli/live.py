"""The lines that move: how the caches fill, how training goes, and how far a validation is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vtrain.contract import Filling, Generating, Logged, StepMetrics, Stepped
from vtrain.contract.specs import bytes_text

WIDE = 120
"""Letters of a terminal's line from which on a bar and a clock stand beside the numbers."""

Part = tuple[str, int]
"""What is shown, and how soon it goes where room is short; 0 stays to the last."""


def fitting(parts: list[Part], width: int | None) -> str:
    """As many of them as there is room for, in their order."""
    while width is not None and len(parts) > 1 and len("  ".join(text for text, _ in parts)) > width:
        parts.remove(max(reversed(parts), key=lambda part: part[1]))
    return "  ".join(text for text, _ in parts)


def numbers(row: StepMetrics, steps: int, seconds: float, width: int | None = None) -> str:
    """One line: loss, what it is made of, learning rate, gradient norm, s/step, training time left, memory.

    seconds: smoothed, per step. The share of the step in which it waited for its data is shown where it is 1% or more.
    width: letters that there is room for; what matters least goes first.
    """
    waiting = row.data_wait >= 0.01 * row.seconds > 0
    # Statistics of blocks are dozens: metrics.jsonl and trackers have them.
    own = {name: value for name, value in row.terms.items() if not name.startswith("statistics/")}
    terms = {"flow_loss": row.flow_loss, **own} if own else {}
    parts: list[Part] = [(f"loss {row.loss:.4f}", 0)]
    parts += [(f"{name} {value:.4g}", 5) for name, value in terms.items()]
    parts.append((f"lr {row.lr:.2e}", 2))
    parts += [(f"norm {row.grad_norm:.3g}", 4)] if row.grad_norm is not None else []
    parts.append((f"{seconds:.3g} s/step", 3))
    parts += [(f"waiting for data {row.data_wait / row.seconds:.0%}", 4)] if waiting else []
    parts.append((f"left {timedelta(seconds=round((steps - row.step) * seconds))}", 1))
    parts.append((f"memory {bytes_text(row.memory)}", 6))
    return fitting(parts, width)


class TrainingLines:
    """How training goes, and validation between its steps: a bar with the newest numbers on a terminal; elsewhere a line for
    each reading, and for validation one now and then."""

    LINE_EVERY = 30.0
    """Seconds between lines of a validation."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self._console, self._steps = console, steps
        self._pace: float | None = None
        self._room = 0
        self._numbers = "waiting for the first numbers" if done < steps else ""
        self._began = self._said = 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            # rich would shorten the counter and the clock first.
            self._room = console.width - len("step ") - 2 * len(str(steps)) - len("/ ")
            bar = (BarColumn(bar_width=24), TimeElapsedColumn()) if console.width >= WIDE else ()
            self._room -= len("0:00:00 ") + 25 if bar else 0
            columns = (TextColumn("step"), MofNCompleteColumn(), *bar, TextColumn("{task.fields[numbers]}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("step", total=steps, completed=done, numbers=self._numbers)
            self._bar.start()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: Stepped | Logged | Generating) -> None:
        """A step's numbers come later than the step. The pace is smoothed so that the time left does not jump."""
        if isinstance(event, Generating):
            self._generating(event)
            return
        if isinstance(event, Stepped):
            if self._bar is not None:
                self._bar.update(self._task, completed=event.step)
            return
        newest = event.steps[-1]
        self._pace = newest.seconds if self._pace is None else 0.7 * self._pace + 0.3 * newest.seconds
        self._numbers = numbers(newest, self._steps, self._pace, self._room if self._bar is not None else None)
        if self._bar is not None:
            self._bar.update(self._task, completed=newest.step)
            self.show_numbers()
        else:
            self._console.print(escape(f"step {newest.step}/{self._steps}  {self._numbers}"))

    def show_numbers(self) -> None:
        """The newest of training, on the live line, whatever stood there."""
        if self._bar is not None:
            self._bar.update(self._task, numbers=escape(self._numbers))

    def _generating(self, event: Generating) -> None:
        now = time.monotonic()
        if (event.stage, event.video, event.solved) == ("solving", 1, 0):
            self._began = self._said = now
        text = generating(event, now - self._began, self._room if self._bar is not None else None)
        if self._bar is not None:
            self._bar.update(self._task, numbers=escape(text))
        elif now - self._said > self.LINE_EVERY:
            self._said = now
            self._console.print(escape(f"step {event.step}/{self._steps}  {text}"))


def generating(event: Generating, seconds: float, width: int | None = None) -> str:
    """One line: which video of a validation, which solver step. seconds: since its first."""
    which = f"{event.video} of {event.videos}"
    if event.stage == "decoding":
        return fitting([("validating", 1), (f"decoding video {which}", 0)], width)
    parts = [("validating", 3), (f"video {which}", 0), (f"solver step {event.solved} of {event.solver_steps}", 1)]
    done = (event.video - 1) * event.solver_steps + event.solved
    if done:
        left = seconds / done * (event.videos * event.solver_steps - done)
        parts.append((f"decoding in {timedelta(seconds=round(left))}", 2))
    return fitting(parts, width)


class FillingLines:
    """How the caches fill: a bar a stage on a terminal; elsewhere a line at the start, at the end, and now and then.

    processes: that fill together, each its share; the first shows its own.
    """

    LINE_EVERY = 30.0
    UNITS: ClassVar = {"text": "captions", "mask": "masks"}
    """Of each stage, by its first word; of all others, clips."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.processes = 1
        self.paces: dict[str, Pace] = {}
        self.said = 0.0
        # On a narrow terminal rich would shorten the counter first.
        bar = (MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn()) if console.width >= WIDE else ()
        columns = (TextColumn("{task.description}"), *bar, TextColumn("{task.fields[pace]}"))
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
                pace = escape(self.beside(stage, over, total, ""))
                self.tasks[stage] = self.bar.add_task(words, total=total, completed=over, pace=pace)
            return
        pace = self.paces[stage].words(over, total, time.monotonic(), self.UNITS.get(stage.split()[0], "clips"))
        self.bar.update(self.tasks[stage], completed=over, pace=escape(self.beside(stage, over, total, pace)))
        late = time.monotonic() - self.said > self.LINE_EVERY
        if over == total or (late and not self.console.is_terminal):
            there = now.done - now.made > self.paces[stage].found
            made = f", {now.made} of them encoded now" if over == total and there else ""
            unusable = f", {now.unusable} cannot be used" if now.unusable else ""
            if made or unusable or not self.console.is_terminal:
                self.say(f"{stage}: {now.done} of {total} cached{made}{unusable}  {pace}")

    def beside(self, stage: str, over: int, total: int, pace: str) -> str:
        """What stands beside the stage's name: on a narrow terminal the counter too, and of the pace what fits."""
        if self.console.width >= WIDE:
            return pace
        parts: list[Part] = [(f"{over}/{total}", 0)]
        parts += [(words, 1 if words.startswith("left ") else 2) for words in pace.split("  ") if words]
        return fitting(parts, self.console.width - len(f"encoding {stage} "))

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
