"""Everything that people ask of a run while it trains, in one place that is read at the end of each step.

A request comes by a signal, by the control file in the output folder, or by a call. Ctrl-C, SIGTERM, SIGHUP (the terminal was
closed) and SIGUSR1 (Slurm's `--signal=USR1@120`, so many seconds before a job's time is over): the first asks the run to save and
end; a second Ctrl-C, a second or more later, ends it at once. A signal that the process was started to ignore stays ignored: a
shell starts what a script puts in the background so that the terminal's Ctrl-C does not reach it, and nohup so that the terminal's
end does not.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType

CONTROL = "control"
"""File in the output folder: words that ask something of the run, deleted when they were read."""
WORDS = ("stop", "save", "validate")
SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    *(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)),
)
ONE_PRESS = 1.0
"""Seconds within which several signals are one wish."""


class Inbox:
    """What was asked. signal: the one that asked the run to stop, None if another did. heard: called when it is asked to.

    validates: whether the run has a validation that can be asked for.
    """

    def __init__(self, heard: Callable[[], None] = lambda: None) -> None:
        self._heard = heard
        self._control: Path | None = None
        self.signal: signal.Signals | None = None
        self._stop, self._since = False, 0.0
        # Not two flags: what is asked between their reading and their clearing would be lost. A put from a signal's handler
        # in the middle of a get is safe here, and would wait for itself behind a lock.
        self._asked: SimpleQueue[str] = SimpleQueue()
        self.validates = True
        self._complaints: list[str] = []

    @property
    def stop(self) -> bool:
        """Whether the run is to save and end."""
        return self._stop

    def ask(self, word: str) -> None:
        """One of WORDS. From any thread. Raises ValueError for another."""
        if word not in WORDS:
            raise ValueError(f'a run can be asked to {", ".join(WORDS)}, not to "{word}"')
        if word == "stop" and not self._stop:
            self._stop, self._since = True, time.monotonic()
            self._heard()
        if word == "validate" and not self.validates:
            self._complaints.append("a validation was asked for, and the configuration has no [validation]")
        elif word != "stop":
            self._asked.put(word)

    def take(self) -> tuple[bool, bool]:
        """(save, validate): whether a checkpoint or a validation was asked for since the last call."""
        self.look()
        words = set[str]()
        with suppress(Empty):
            while True:
                words.add(self._asked.get_nowait())
        return "save" in words, "validate" in words

    def complaints(self) -> list[str]:
        """What was asked since the last call and cannot be done."""
        said, self._complaints = self._complaints, []
        return said

    def watch(self, folder: Path) -> None:
        """Read the control file of a run's output folder from here on; what an earlier run left there goes. Raises OSError."""
        self._control = folder / CONTROL
        # A "stop" that an earlier run left unread would end this one at its first step.
        self._control.unlink(missing_ok=True)

    def look(self) -> None:
        """Read the control file. One look at a name that is usually not there: microseconds a step."""
        if self._control is None:
            return
        aside = self._control.with_name(f".{CONTROL}.read")
        try:
            if not self._control.stat().st_size:
                return  # whoever writes it has only opened it
            self._control.rename(aside)  # what is written from here on is another file, and not deleted unread
            words = aside.read_text(encoding="utf-8", errors="replace").split()
            aside.unlink()
        except OSError:
            return
        for word in words:
            if word in WORDS:
                self.ask(word)
            else:
                self._complaints.append(f'the control file asked for "{word}"; its words are {", ".join(WORDS)}')

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch those of the signals that are not ignored, for the length of the with block. Of the main thread only.

        A launcher passes on the Ctrl-C that its processes got from the terminal too: two at once are one.
        """

        def ask(number: int, _frame: FrameType | None) -> None:
            if not self._stop:
                self.signal = signal.Signals(number)
                self.ask("stop")
            elif number == signal.SIGINT and time.monotonic() - self._since > ONE_PRESS:
                raise KeyboardInterrupt

        # None: a handler that was not set from Python, which could not be put back.
        caught = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, ask) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
