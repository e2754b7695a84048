"""Around the import of a plugin in this process: it has a limited time, and what it writes stays off standard output."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.machinery import EXTENSION_SUFFIXES

from vtrain.registry.trials import LIMIT


@contextmanager
def in_time(limit: float) -> Iterator[None]:
    """Raise TimeoutError inside after `limit` seconds, 0: never. What came through its trial may hang later, for want of a network.

    In the main thread alone, where the system has timers; and not in C code that does not come back.
    """
    if not limit or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it is not imported after {limit:g} s ({LIMIT})")

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, limit, 1.0)  # again and again: the plugin may catch it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)


_ALONE = threading.RLock()
"""Held while standard output is another: two threads that took turns would each restore what the other had put there."""


@contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """What is written to standard output inside goes to standard error, also by C libraries and by child processes."""
    with _ALONE:
        _flush()
        loaded = set(sys.modules)
        try:
            kept = os.dup(1)
        except OSError:  # there is none
            kept = -1
        try:
            if kept >= 0:
                _redirect(kept)
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _flush()
            if kept >= 0:
                _flush_c(sys.modules.keys() - loaded)
                os.dup2(kept, 1)
                os.close(kept)


def _redirect(kept: int) -> None:
    """kept: the copy of standard output; it has the number of standard error where there is none."""
    with suppress(OSError):
        if kept != 2:
            os.dup2(2, 1)
            return
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)


def _flush() -> None:
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None:
            with suppress(OSError, ValueError):  # nobody reads it, or it is closed
                stream.flush()


def _flush_c(new: Iterable[str]) -> None:
    """What C libraries hold back of their output, if there may be any. new: names of the modules that were imported.

    Importing ctypes takes longer than all else here, so it is not imported where no code but Python's and its own library's
    came in.
    """
    foreign = (name for name in new if name.partition(".")[0] not in sys.stdlib_module_names)
    files = (str(getattr(sys.modules.get(name), "__file__", "")) for name in foreign)
    if "ctypes" in sys.modules or any(file.endswith(tuple(EXTENSION_SUFFIXES)) for file in files):
        with suppress(Exception):
            import ctypes

            ctypes.CDLL(None).fflush(None)
