"""Several processes of one command on this machine: started, sent signals, and ended together (run.processes)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import tomli

from vtrain.cli.run import UNVALIDATED

MOST = 1024
GRACE = 10.0
"""Seconds in which the others may end by themselves after one has failed: an error of the user's is raised on all."""
LAST = 5.0
"""Seconds from the signal that asks a process to end to the one that it cannot refuse."""
PAUSE = 0.05
LAUNCHER = "VTRAIN_LAUNCHER"
"""Environment variable of the processes that `launch` starts: its own process."""
PASSED_ON = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


def processes_of(config: Path) -> int:
    """run.processes of a file; 1 where a launcher has started this process, and where the file is not valid: it is read again, and
    what is wrong with it is said then."""
    if os.environ.get("WORLD_SIZE"):
        return 1
    try:
        table = tomli.loads(config.read_text(encoding="utf-8")).get("run")
    except (OSError, ValueError):
        return 1
    found = table.get("processes") if isinstance(table, Mapping) else None
    return found if type(found) is int and 1 < found <= MOST else 1


def launch(count: int, config: Path) -> int:
    """Run this very command in `count` processes. Gives its exit code: that of the first that failed, else the first process's."""
    children: list[subprocess.Popen[bytes]] = []
    with _passing_on(children):
        port = os.environ.get("MASTER_PORT") or str(_free_port())
        for rank in range(count):
            command = [sys.executable, "-P", "-m", "vtrain.cli", *sys.argv[1:]]  # -P: not what lies in this folder
            # Groups of their own: Ctrl-C would reach them twice, and the second one means at once.
            children.append(subprocess.Popen(command, env=_environment(rank, count, port), start_new_session=True))
        failed = _watched(children)
    if failed is None:
        return children[0].returncode
    code = children[failed].returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    why = ", as systems do where memory runs out" if code == -getattr(signal, "SIGKILL", 0) else ""
    if code != 2:  # else it has said itself what is wrong
        resumes = f"Start the command again: it resumes from the newest checkpoint ({config})."
        sys.stderr.write(f"process {failed + 1} of {count} {how}{why}; the others were ended. {resumes}\n")
    return 128 - code if code < 0 else code


def _environment(rank: int, count: int, port: str) -> dict[str, str]:
    """As torchrun has it."""
    threads = str(max(1, (os.cpu_count() or 1) // count))  # each process would take all
    return {
        "OMP_NUM_THREADS": threads, "MASTER_ADDR": "127.0.0.1", **os.environ, "MASTER_PORT": port,
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        LAUNCHER: str(os.getpid()),
    }  # fmt: skip


def follow() -> None:
    """In a process that `launch` has started: end as at SIGTERM, all saved, once the launcher is gone, as by kill -9. Nobody would
    pass a signal on any more, and the output folder would stay taken."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or os.name == "nt" or str(os.getppid()) != launcher:  # else it is of a process further up
        return

    def watch() -> None:
        while str(os.getppid()) == launcher:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _watched(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all. Which one failed, None where all ended as they should: once one has, the others get GRACE to end."""
    since: float | None = None
    failed: list[int] = []
    while any(child.poll() is None for child in children):
        if since is None:
            since = time.monotonic() if any(map(_has_failed, children)) else None
        elif (waited := time.monotonic() - since) > GRACE:
            failed = failed or [at for at, child in enumerate(children) if _has_failed(child)]
            _tell(children, signal.SIGTERM if waited < GRACE + LAST else getattr(signal, "SIGKILL", signal.SIGTERM))
            time.sleep(1.0)
        time.sleep(PAUSE)
    failed = failed or [at for at, child in enumerate(children) if _has_failed(child)]
    # Of those that failed by themselves: who was killed, then who has not said what is wrong.
    return min(failed, key=lambda at: (children[at].returncode > 0, children[at].returncode == 2), default=None)


def _has_failed(child: subprocess.Popen[bytes]) -> bool:
    """A signal that was taken as a request, and a validation that failed, are no failure of a process."""
    return child.returncode is not None and child.returncode not in (0, UNVALIDATED) and child.returncode < 128


def _tell(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            with suppress(OSError):
                child.send_signal(number)


@contextmanager
def _passing_on(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Signals to this process go to all; at the end, none of them is left."""
    before = {number: signal.signal(number, lambda number, _: _tell(children, number)) for number in PASSED_ON}
    try:
        yield
    finally:
        _tell(children, getattr(signal, "SIGKILL", signal.SIGTERM))
        for number, handler in before.items():
            signal.signal(number, handler)
