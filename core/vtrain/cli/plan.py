"""`vtrain plan`: everything a run would do, priced, without loading a weight."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from vtrain.cli.prepare import prepare
from vtrain.cli.report import visible
from vtrain.plan.price import Prices
from vtrain.plan.records import Plan, Section, Survey
from vtrain.plan.render import as_json, sections


def plan(config: Path, as_json_text: bool) -> None:
    """Print the plan of `config`. Raises what `prepare` raises."""
    prepared = prepare(config)
    if as_json_text:
        print(json.dumps(as_json(prepared.plan, prepared.scan.survey, prepared.prices), indent=2))  # noqa: T201
    else:
        console = Console(soft_wrap=True, highlight=False)
        for message in prepared.scan.messages:
            console.print(escape(message))
        show(console, prepared.plan, prepared.scan.survey, prepared.prices)


def show(console: Console, plan: Plan, survey: Survey, prices: Prices) -> None:
    """All of it."""
    show_sections(console, sections(plan, survey, prices))


def show_sections(console: Console, parts: Iterable[Section]) -> None:
    """A title a section, its rows in columns. Lines are as long as they are: no path is cut or wrapped."""
    for section in parts:
        console.print(escape(visible(section.title)), style="bold", soft_wrap=True)
        widths = [max(map(len, column)) for column in zip(*section.rows, strict=True)]
        for row in section.rows:
            # Columns of a table hold numbers, which stand under each other on the right.
            rest = [
                cell.rjust(width) if section.table else cell.ljust(width)
                for cell, width in zip(row[1:], widths[1:], strict=True)
            ]
            line = visible("  ".join((row[0].ljust(widths[0]), *rest)).rstrip()).replace("\n", "\\n")
            console.print(f"  {escape(line)}", soft_wrap=True, highlight=False)
