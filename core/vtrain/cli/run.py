"""`vtrain run`: the events of a run, on a terminal or as JSON lines."""

from __future__ import annotations

import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

from vtrain import api
from vtrain.cli.terminal import Terminal
from vtrain.contract.events import VERSION, Event, as_json


def run(config: Path, as_json_lines: bool = False) -> None:
    """Train as `config` says. Exits with 0 at the last step, 130 or 143 after Ctrl-C or SIGTERM, everything saved."""
    terminal = Terminal(quiet=as_json_lines)
    lines = sys.stdout
    # What a plugin prints must not stand between the lines of JSON.
    with (
        redirect_stdout(sys.stderr if as_json_lines else lines),
        api.run(config, signals=True, heard=terminal.heard, process_ends=True) as session,
        terminal.following(session),
    ):
        for event in session:
            if as_json_lines and session.processes.first:
                print(_line(event), file=lines, flush=True)
            terminal.show(event)
    if session.signal is not None:
        sys.exit(128 + session.signal)


def _line(event: Event) -> str:
    return json.dumps({"version": VERSION, "time": round(time.time(), 3), **as_json(event)})
