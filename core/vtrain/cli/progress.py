"""What a run shows: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import ClassVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from vtrain.data.caching.fill_text import Standing
from vtrain.plan.price import bytes_text
from vtrain.train.loop import Event, Logged, Saved, Stopped, Validated, Warned
from vtrain.train.metrics import Row


def numbers(row: Row, steps: int, seconds: float) -> str:
    """One line: loss, what it is made of, learning rate, gradient norm, s/step, time left, memory. seconds: smoothed, per step.

    The share of the step in which it waited for its data is shown where it is 1% or more.
    """
    parts = {"flow_loss": row.flow_loss, **row.terms} if row.terms else {}
    terms = "".join(f"  {name} {value:.4g}" for name, value in parts.items())
    norm = f"  norm {row.grad_norm:.3g}" if row.grad_norm is not None else ""
    left = timedelta(seconds=round((steps - row.step) * seconds))
    waiting = f"  waiting for data {row.data_wait / row.seconds:.0%}" if row.data_wait >= 0.01 * row.seconds > 0 else ""
    pace = f"{seconds:.3g} s/step{waiting}  left {left}"
    return f"loss {row.loss:.4f}{terms}  lr {row.lr:.2e}{norm}  {pace}  {bytes_text(row.memory)}"


class Display:
    """Shows events as they come. Silent on processes beside the first."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self.console, self.steps = console, steps
        self.pace: float | None = None
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("step", total=steps, completed=done, numbers="waiting for the first numbers")

    def __enter__(self) -> Display:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, event: Event) -> None:
        if isinstance(event, Logged):
            self.rows(event.rows)
        elif isinstance(event, Saved):
            self.say(f"saved {event.folder}" + (f", {len(event.deleted)} older deleted" if event.deleted else ""))
            if event.trouble:
                self.say(f"WARNING: {event.trouble}", style="bold red")
        elif isinstance(event, Validated):
            for path in (*event.files.values(), event.sheet):
                if path is not None:
                    self.say(f"wrote {path}")
        elif isinstance(event, Warned):
            self.say(f"WARNING: {event.text}", style="bold red")
        elif isinstance(event, Stopped):
            why = "all steps are done" if event.signal is None else "stopped as asked; run the same command to go on"
            if event.signal is None and event.step > self.steps:
                self.say(f"step {event.step}: this run has {self.steps} steps, all are done")
            else:
                self.say(f"step {event.step} of {self.steps}: {why}")

    def stepped(self, done: int) -> None:
        """An optimizer step was queued on the device; its numbers may come later."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done)

    def rows(self, rows: tuple[Row, ...]) -> None:
        """Show the newest step; the pace is smoothed so that the time left does not jump."""
        row = rows[-1]
        self.pace = row.seconds if self.pace is None else 0.7 * self.pace + 0.3 * row.seconds
        text = numbers(row, self.steps, self.pace)
        if self.bar is not None:
            self.bar.update(self.task, completed=row.step, numbers=escape(text))
        else:
            self.say(f"step {row.step}/{self.steps}  {text}")

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(escape(text), style=style, soft_wrap=True, highlight=False)


class Filling:
    """Shows how caches fill: a bar a stage on a terminal; elsewhere a line at the start, at the end, and now and then.

    processes: that fill together, each its share; the first shows its own.
    """

    LINE_EVERY = 30.0
    UNITS: ClassVar = {"text": "captions", "mask": "masks"}
    """Of each stage; of all others, clips."""

    def __init__(self, console: Console, processes: int = 1) -> None:
        self.console = console
        self.whose = f" (the first process's share of {processes})" if processes > 1 else ""
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

    def __enter__(self) -> Filling:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def report(self, now: Standing) -> None:
        """The first call of a stage tells what was there."""
        stage, total, over = now.stage, now.total, now.done + now.unusable
        if stage not in self.paces:
            self.paces[stage] = Pace(over, time.monotonic())
            self.say(f"{stage}: {now.done} of {total} cached{_to_do(now)}{self.whose}")
            if over < total:
                words = escape(f"encoding {stage}")
                self.tasks[stage] = self.bar.add_task(words, total=total, completed=over, pace="")
            return
        pace = self.paces[stage].words(over, total, time.monotonic(), self.UNITS.get(stage, "clips"))
        self.bar.update(self.tasks[stage], completed=over, pace=escape(pace))
        late = time.monotonic() - self.said > self.LINE_EVERY
        if over == total or (late and not self.console.is_terminal):
            there = now.done - now.made > self.paces[stage].found
            anew = f", {now.made} of them encoded now" if over == total and there else ""
            unusable = f", {now.unusable} cannot be used" if now.unusable else ""
            if anew or unusable or not self.console.is_terminal:
                self.say(f"{stage}: {now.done} of {total} cached{anew}{unusable}  {pace}")

    def say(self, text: str) -> None:
        self.said = time.monotonic()
        self.console.print(escape(text), soft_wrap=True, highlight=False)


def _to_do(now: Standing) -> str:
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
