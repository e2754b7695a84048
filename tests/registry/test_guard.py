"""What holds around the import of a plugin in this process: a limited time, and standard output kept clean."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vtrain.registry import discover, trials
from vtrain.registry.guard import in_time, stdout_on_stderr

InstallPlugin = Callable[..., Path]


def test_what_a_plugin_writes_past_python_on_import_does_not_reach_stdout(
    install_plugin: InstallPlugin, capfd: pytest.CaptureFixture[str]
) -> None:
    ways = """
    import ctypes, os, subprocess, sys
    os.write(1, b"by descriptor\\n")
    subprocess.run(["echo", "by a program"], check=True)
    print("by the stream of before", file=sys.__stdout__)
    ctypes.CDLL(None).printf(b"by a library, which holds it back\\n")
    """
    install_plugin("loud", ways)
    print("before")
    discover(["loud"])
    print("after")
    ctypes.CDLL(None).fflush(None)  # as at the end of the process
    out, err = capfd.readouterr()
    assert out == "before\nafter\n"
    said = {"by descriptor", "by a program", "by a library, which holds it back"}
    assert said <= set(err.splitlines())


def test_stdout_is_what_it_was_after_an_import_that_fails(
    install_plugin: InstallPlugin, capfd: pytest.CaptureFixture[str]
) -> None:
    install_plugin("broken", "1 / 0")
    discover(["broken"])
    subprocess.run(["echo", "from a program"], check=True)
    assert capfd.readouterr().out == "from a program\n"


def test_threads_that_plan_at_once_leave_stdout_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    """Each would restore what the other had put there."""
    first_is_in, second_is_in, first_left = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with stdout_on_stderr():
            first_is_in.set()
            second_is_in.wait(0.2)  # which waits for this one, so the time passes
        first_left.set()

    def second() -> None:
        first_is_in.wait()
        with stdout_on_stderr():
            second_is_in.set()
            first_left.wait(5)

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    subprocess.run(["echo", "from a program"], check=True)
    assert capfd.readouterr().out == "from a program\n"


def test_without_standard_streams_nothing_fails_and_nothing_else_is_written_to() -> None:
    code = """
import os
from vtrain.registry.guard import stdout_on_stderr
for closed in ((0,), (1,), (2,), (1, 2), (0, 1, 2)):
    if os.fork() == 0:
        for number in closed:
            os.close(number)
        with stdout_on_stderr():
            try:
                os.write(1, b"inside ")
            except OSError:
                pass
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 7, closed
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"inside ")


def test_an_import_that_hangs_here_though_it_came_through_its_trial_is_a_row(
    install_plugin: InstallPlugin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = install_plugin("waits", "import time\ntime.sleep(600)")
    monkeypatch.setenv("VTRAIN_PLUGIN_TIMEOUT", "0.2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(trials, "tried_apart", lambda plugins, limit: ["" for _ in plugins])
    (row,) = [each for each in discover(["waits"]).failures if each.entry_point == "waits"]
    place = f"{folder / 'waits_plugin.py'}:2"
    assert row.reason == f"TimeoutError: it is not imported after 0.2 s (VTRAIN_PLUGIN_TIMEOUT) ({place})"


def test_the_callers_own_timer_stays() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000)
        with in_time(5):
            pass
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        signal.raise_signal(signal.SIGALRM)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
