"""What a file amounts to: its schema and values (`vtrain config`), and everything that a run would do (`vtrain plan`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import typer

from vtrain import api
from vtrain.cli.report import bold, columns, folded, looking, print_json, print_table, say, visible
from vtrain.config import json_schema, load, show
from vtrain.config.findings import shown
from vtrain.contract import ConfigError, Problem, Section
from vtrain.contract.rooms import bytes_of
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
        names = ("key", "value", "origin", "resume")
        print_json([{name: getattr(row, name) for name in names} for row in rows])
        return
    cells = [(row.key, "absent" if row.value is None else shown(row.value, 10_000), row.origin) for row in rows]
    print_table(("key", "value", "origin"), cells)


def plan(config: Path, as_json_text: bool, plots: Path | None = None, device_memory: str = "") -> None:
    """Print the plan of `config`. Raises what `prepare` raises. Without rich, whose console takes as long as a scan.

    plots: folder, or file that ends in .png, for a drawing of it; what cannot be drawn is an error. device_memory: of the card
    of another machine, such as "24GiB"; "": of this one's.
    """
    try:
        room = bytes_of(device_memory) if device_memory else None
    except ValueError as error:
        raise ConfigError(Problem("--device-memory", f"{error}.")) from error
    with looking() as on_file:
        prepared = api.plan(config, on_file, room)
    drawn = None
    if plots is not None:
        from vtrain.run.plots import draw_plots

        drawn = draw_plots(prepared, plots)
    if as_json_text:
        whole = as_json(prepared.plan, prepared.scan.survey, prepared.estimate)
        print(json.dumps(whole | ({"plots": str(drawn)} if drawn else {}), indent=2))  # noqa: T201
        return
    for message in prepared.scan.messages:
        say(message)
    found = sections(prepared.plan, prepared.scan.survey, prepared.estimate)
    for line, is_title in section_lines(found, columns(sys.stdout)):
        typer.echo(bold(line) if is_title else line)
    if drawn is not None:
        say(f"drawn: {drawn}")


def show_sections(console: Console, parts: Iterable[Section]) -> None:
    """Sections on a console; into a file or a pipe, lines are as long as they are."""
    from rich.markup import escape

    for line, is_title in section_lines(parts, console.width if console.is_terminal else None):
        console.print(escape(line), style="bold" if is_title else None, soft_wrap=True, highlight=False)


def section_lines(parts: Iterable[Section], width: int | None) -> Iterator[tuple[str, bool]]:
    """(line, whether it is a title): a title a section, its rows in columns. width: of a terminal, None for none.

    There, texts go on below themselves, and a table's heads stand in several lines; no word is broken.
    """
    for section in parts:
        yield visible(section.title), True
        rows = [[visible(cell).replace("\n", "\\n") for cell in row] for row in section.rows]
        lines = _table(rows, width) if section.table else _texts(rows, width)
        yield from ((f"  {line}".rstrip(), False) for line in lines)


def _texts(rows: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """(label, text ...) rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(size) for cell, size in zip(row[:-1], widths, strict=False)]
        start = "".join(f"{cell}  " for cell in cells)
        yield from folded(row[-1], width and width - 2, start, " " * len(start))


def _table(rows: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """Rows of numbers, which stand under each other on the right; the first has the columns' names."""
    heads = [[name] for name in rows[0]]
    if width is not None and sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True)) >= width:
        heads = [wrap(name, max(map(len, (*name.split(), *cells)))) for name, *cells in zip(*rows, strict=True)]
    most = max(map(len, heads))
    names = zip(*([""] * (most - len(head)) + head for head in heads), strict=True)
    whole = [*names, *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    for row in whole:
        rest = (cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True))
        yield "  ".join((row[0].ljust(widths[0]), *rest))
