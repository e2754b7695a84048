"""Ctrl-C and SIGTERM: the first asks the run to save and end; a second Ctrl-C, a second or more later, ends it at once.

A signal that the process was started to ignore stays ignored: a shell starts what a script puts in the background so that
the terminal's Ctrl-C does not reach it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ONE_PRESS = 1.0
"""Seconds within which several signals are one wish."""


class StopRequest:
    """Whether, and by which signal, the run has been asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.since = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def listening(heard: Callable[[], None] = lambda: None) -> Iterator[StopRequest]:
    """Catch those of the two signals that are not ignored, for the length of the with block. heard: called at the first.

    A launcher passes on the Ctrl-C that its processes got from the terminal too: two at once are one.
    """
    request = StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not request:
            request.signal, request.since = signal.Signals(number), now
            heard()
        elif number == signal.SIGINT and now - request.since > ONE_PRESS:
            raise KeyboardInterrupt

    caught = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in caught}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
