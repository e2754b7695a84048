"""`vtrain plan`: everything a run would do, priced, without loading a weight."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vtrain import api
from vtrain.cli.report import bold, visible
from vtrain.contract import Section
from vtrain.data.scanning.surveys import Survey
from vtrain.estimate.estimate import Estimate
from vtrain.estimate.render import as_json, sections
from vtrain.plan.records import Plan

if TYPE_CHECKING:
    from rich.console import Console


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


def show(console: Console, plan: Plan, survey: Survey, estimate: Estimate) -> None:
    """All of it."""
    show_sections(console, sections(plan, survey, estimate))


def show_sections(console: Console, parts: Iterable[Section]) -> None:
    """The same on a console. Lines are as long as they are: no path is cut or wrapped."""
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
