"""What a file amounts to: its schema and values (`vtrain config`), and everything that a run would do (`vtrain plan`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vtrain import api
from vtrain.cli.report import bold, print_json, print_table, visible
from vtrain.config import json_schema, load, show
from vtrain.config.findings import shown
from vtrain.contract import Section
from vtrain.estimate.render import as_json, sections
from vtrain.registry import discover
from vtrain.registry.guard import stdout_on_stderr

if TYPE_CHECKING:
    from rich.console import Console


def print_schema() -> None:
    """The JSON Schema on stdout."""
    print_json(json_schema(discover()))


def show_config(path: Path, as_json: bool) -> None:
    """Every resolved value with its origin. Raises ConfigError."""
    with stdout_on_stderr():  # options of plugins are made, whose code may print
        rows = show(load(path, discover()))
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    cells = [(row.key, "absent" if row.value is None else shown(row.value, 10_000), row.origin) for row in rows]
    print_table(("key", "value", "origin"), cells)


def plan(config: Path, as_json_text: bool) -> None:
    """Print the plan of `config`. Raises what `prepare` raises. Without rich, whose console takes as long as a scan."""
    prepared = api.plan(config)
    if as_json_text:
        print(json.dumps(as_json(prepared.plan, prepared.scan.survey, prepared.estimate), indent=2))  # noqa: T201
        return
    for message in prepared.scan.messages:
        typer.echo(message)
    for line, is_title in _lines(sections(prepared.plan, prepared.scan.survey, prepared.estimate)):
        typer.echo(bold(line) if is_title else line)


def show_sections(console: Console, parts: Iterable[Section]) -> None:
    """Sections on a console. Lines are as long as they are: no path is cut or wrapped."""
    from rich.markup import escape

    for line, is_title in _lines(parts):
        console.print(escape(line), style="bold" if is_title else None, soft_wrap=True, highlight=False)


def _lines(parts: Iterable[Section]) -> Iterator[tuple[str, bool]]:
    """(line, whether it is a title): a title a section, its rows in columns."""
    for section in parts:
        yield visible(section.title), True
        widths = [max(map(len, column)) for column in zip(*section.rows, strict=True)]
        for row in section.rows:
            # Columns of a table hold numbers, which stand under each other on the right.
            rest = [
                cell.rjust(width) if section.table else cell.ljust(width)
                for cell, width in zip(row[1:], widths[1:], strict=True)
            ]
            line = visible("  ".join((row[0].ljust(widths[0]), *rest)).rstrip()).replace("\n", "\\n")
            yield f"  {line}", False
