"""Errors and tables to the terminal. Text from files and plugins is shown as it is, never read as markup or as control codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING, TextIO

import typer

if TYPE_CHECKING:
    from vtrain.contract import VtrainError

Cells = Sequence[str]

_NARROW = 30
"""Columns of a terminal that words need to stand beside other cells."""
_WIDEST = 60
"""Columns of a terminal that words take where other cells follow."""
_PADDED = 40
"""Columns of a file that a cell is padded to: one long one would push what follows in every row far to the right."""

_EVERY = 100
"""Files between one sign of progress and the next."""


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


def columns(stream: TextIO) -> int | None:
    """Letters of a terminal's line; None for a file or a pipe, in which no line is broken."""
    if not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    try:
        found = int(given) if given.isdecimal() else os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        found = 0
    return found or 80


def folded(text: str, width: int | None, first: str = "", rest: str = "") -> list[str]:
    """A text in lines of fewer letters than `width`, broken between words: a longer word, such as a path, stays whole.

    width: None for one line. first, rest: what stands before the first line, and before the others.
    """
    if width is None:
        return [first + text]
    lines = wrap(
        text, max(20, width - 1), initial_indent=first, subsequent_indent=rest,
        break_long_words=False, break_on_hyphens=False, replace_whitespace=False,
    )  # fmt: skip
    return lines or [first.rstrip()]


def say(text: str, *, err: bool = False) -> None:
    """A line of words to the standard output or error."""
    width = columns(sys.stderr if err else sys.stdout)
    typer.echo("\n".join(folded(one_line(text), width, rest="  ")), err=err)


@contextmanager
def looking() -> Iterator[Callable[[int], None] | None]:
    """For the length of a scan: what to call with the number of files so far, shown on a terminal's line that goes at the end."""
    if not sys.stderr.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        yield None
        return

    def show(done: int) -> None:
        if done % _EVERY == 0:
            sys.stderr.write(f"\r\x1b[2Klooking at the files{f': {done}' if done else ''}")
            sys.stderr.flush()

    try:
        show(0)
        yield show
    finally:
        sys.stderr.write("\r\x1b[2K")
        sys.stderr.flush()


SHOWN = 20
"""Problems that are shown in full; more than that nobody reads at once."""


def report_error(error: VtrainError) -> None:
    """The problems on stderr: where, what, remedy; the first of many, and how many more there are."""
    count, width = len(error.problems), columns(sys.stderr)
    title = "error:" if count == 1 else f"{count} errors:"
    lines = [typer.style(title, fg="red", bold=True)]
    for problem in error.problems[:SHOWN]:
        place = f"{problem.where}: " if problem.where else ""
        for text, margin in ((f"{place}{problem.what}", "  "), (problem.remedy, "      ")):
            for line in visible(text).splitlines():
                lines += folded(line, width, margin, margin)
    if count > SHOWN:
        lines.append(f"  and {count - SHOWN} more")
    typer.echo("\n".join(lines), err=True)


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(heads: Cells, rows: Sequence[Cells], *, turned: bool = False) -> None:
    """Columns. On a terminal as wide as it is; into a file or a pipe every row is one line, without colour.

    turned: where a terminal is too narrow, a row is a column: for tables of many numbers and few rows.
    """
    clean = [[visible(cell).replace("\n", " ") for cell in row] for row in rows]
    width = columns(sys.stdout)
    if width is None:
        widths = [min(_PADDED, max(map(len, column))) for column in zip(heads, *clean, strict=True)]
        for row in [heads, *clean]:
            typer.echo(_row(row, widths))
        return
    if turned and sum(max(map(len, column)) + 2 for column in zip(heads, *clean, strict=True)) > width:
        heads, *clean = (list(cells) for cells in zip(heads, *clean, strict=True))
    title, *lines = table_lines(heads, clean, width)
    typer.echo("\n".join(map(bold, title)))
    for each in lines:
        typer.echo("\n".join(each))


def table_lines(heads: Cells, rows: Sequence[Cells], width: int) -> Iterator[list[str]]:
    """The lines of the heads, then those of each row, on a terminal of this width.

    Where rows are too long, the longest cells are folded beside the others if there is room for words; else they stand below
    them, and so do the next longest, until the others fit. No word is broken.
    """
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(heads, *rows, strict=True)]
    widths = [*(min(_WIDEST, each) for each in widths[:-1]), widths[-1]]

    def room() -> int:
        """What the columns that are beside each other leave of a line; negative where they are too long."""
        return width - 1 - sum(widths[each] for each in kept) - 2 * (len(kept) - 1)

    kept, below = list(range(len(heads))), list[int]()
    while len(kept) > 1 and room() < 0:
        long = max(kept[1:] if below else kept, key=lambda each: widths[each])
        if not below and widths[long] + room() >= _NARROW:
            widths[long] += room()
            break
        kept.remove(long)
        below.append(long)
    if len(below) == 1 and 2 * sum(cell_len(row[below[0]]) <= room() - 2 for row in rows) > len(rows):
        widths[below[0]] = room() - 2  # most of its cells fit; only those that do not stand below
        kept = sorted([*kept, *below])
    for row in (heads, *rows):
        under = [each for each in sorted(below) if each not in kept or cell_len(row[each]) > widths[each]]
        cells = [folded("" if each in under else row[each], widths[each] + 1) for each in kept]
        kept_widths = [widths[each] for each in kept]
        lines = [_row(each, kept_widths, cell_len) for each in zip_longest(*cells, fillvalue="")]
        for each in under:
            name = f"{heads[each]}: " if len(below) > 1 and row is not heads else ""
            lines += folded(f"{name}{row[each]}", width, "    ", "    ") if row[each] else []
        yield lines


def _row(cells: Cells, widths: Sequence[int], length: Callable[[str], int] = len) -> str:
    """length: of a cell, in columns."""
    padded = (cell + " " * (width - length(cell)) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()
