"""`vtrain run`: the events of a run, on a terminal or as JSON lines."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

from vtrain import api
from vtrain.cli.terminal import Terminal
from vtrain.contract.events import VERSION, Ended, Event, as_json

UNVALIDATED = 3
"""Exit code of a run that ended as it should, all saved, without the videos of its last validation."""
CLOSED = (errno.EPIPE, errno.EIO)
"""A pipe that nobody reads, a terminal that is gone."""


def run(config: Path, as_json_lines: bool = False) -> None:
    """Train as `config` says. Exits with 0 at the end; with UNVALIDATED if the last validation failed.

    With 128 and the signal's number after Ctrl-C, SIGTERM and SIGHUP, and as for SIGPIPE where nobody reads standard output any
    more; everything is saved then.
    """
    terminal = Terminal(quiet=as_json_lines)
    lines, unread, unvalidated = sys.stdout, False, False
    # What a plugin prints must not stand between the lines of JSON.
    with (
        redirect_stdout(sys.stderr if as_json_lines else lines),
        api.run(config, signals=True, heard=terminal.heard, process_ends=True) as session,
        terminal.following(session),
    ):
        for event in session:
            unvalidated |= isinstance(event, Ended) and event.last_validation_failed
            try:
                if as_json_lines and session.processes.first and not unread:
                    print(_line(event), file=lines, flush=True)
                terminal.show(event)
            except OSError as error:
                if error.errno not in CLOSED:
                    raise
                unread = True
                terminal.mute()
                with suppress(OSError):  # else Python fails to flush it at its end
                    os.dup2(os.open(os.devnull, os.O_WRONLY), lines.fileno())
                session.ask("stop")
    if unread:
        with suppress(OSError):
            sys.stderr.write(f"nobody reads standard output any more: saved and stopped; {terminal.again}\n")
    if session.signal is not None or unread:
        sys.exit(128 + (session.signal or signal.SIGPIPE))
    if unvalidated:
        sys.exit(UNVALIDATED)


def _line(event: Event) -> str:
    return json.dumps({"version": VERSION, "time": round(time.time(), 3), **as_json(event)})
