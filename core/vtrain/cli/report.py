"""Errors and tables to the terminal. Text from files and plugins is shown as it is, never read as markup or as control codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vtrain.contract import VtrainError

Cells = Sequence[str]


def visible(text: str) -> str:
    """Text with its control characters written out, so that no file or plugin can move the cursor; line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


def one_line(text: str) -> str:
    """Text from a file as one line that moves no cursor."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def bold(text: str) -> str:
    """For `typer.echo`, which prints it bold on a terminal and as it is elsewhere; so does this where TERM knows no bold."""
    return text if os.environ.get("TERM") in ("dumb", "unknown") else typer.style(text, bold=True)


SHOWN = 20
"""Problems that are shown in full; more than that nobody reads at once."""


def report_error(error: VtrainError) -> None:
    """The problems on stderr: where, what, remedy; the first of many, and how many more there are."""
    count = len(error.problems)
    title = "error:" if count == 1 else f"{count} errors:"
    lines = [typer.style(title, fg="red", bold=True)]
    for problem in error.problems[:SHOWN]:
        place = f"{problem.where}: " if problem.where else ""
        lines += _indented(f"{place}{problem.what}", "  ")
        lines += _indented(problem.remedy, "      ")
    if count > SHOWN:
        lines.append(f"  and {count - SHOWN} more")
    typer.echo("\n".join(lines), err=True)


def _indented(text: str, margin: str) -> list[str]:
    return [margin + line for line in visible(text).splitlines()]


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(heads: Cells, rows: Sequence[Cells]) -> None:
    """Columns: wrapped to the terminal's width there; whole lines, and no colour, into a file or a pipe."""
    clean = [[visible(cell).replace("\n", " ") for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(heads, clean)
        return
    widths = [max(len(row[column]) for row in [heads, *clean]) for column in range(len(heads))]
    for row in [heads, *clean]:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _rich_table(heads: Cells, rows: Sequence[Cells]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for head in heads:
        table.add_column(Text(head), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
