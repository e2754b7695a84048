"""`vtrain config`: the schema of the file, and what a file resolves to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from vtrain.cli.report import print_json, print_table
from vtrain.config import json_schema, load, show
from vtrain.config.findings import shown
from vtrain.registry import discover


def print_schema() -> None:
    """The JSON Schema on stdout."""
    print_json(json_schema(discover()))


def show_config(path: Path, as_json: bool) -> None:
    """Every resolved value with its origin. Raises ConfigError."""
    rows = show(load(path, discover()))
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    cells = [(row.key, "absent" if row.value is None else shown(row.value, 10_000), row.origin) for row in rows]
    print_table(("key", "value", "origin"), cells)
