"""`vtrain verify`: each line as it is found, and the verdict as the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from vtrain import api
from vtrain.cli.report import say


def verify(path: Path, everything: bool, as_json: bool) -> None:
    """Verify and say so; exits with 2 if the run is not sound. Raises what `vtrain.api.verify` raises."""
    found = api.verify(path, everything, on_line=lambda text: say(text, err=as_json))
    if as_json:
        print(json.dumps(found.as_json()))  # noqa: T201
    if found.verdict == "not sound":
        raise typer.Exit(2)
