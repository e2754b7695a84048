"""Rows of a table in CSV, JSON lines or Parquet: streamed, wanted columns alone, or single cells by their row's number."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from threading import Lock
from typing import Any, BinaryIO

from vtrain.contract import DataError, Problem, SourceRef
from vtrain_builtin.files import Folder

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

_LONGEST_LINE, _LONGEST_HEADER = 16 << 20, 1 << 16
_BATCH = 1024
LARGEST_GROUP = 1 << 30
"""Bytes of the columns that are read, in one row group of a Parquet file that holds clips."""

Choose = Callable[[Sequence[str], bool], Sequence[str]]
"""(the table's columns, whether these are all: the first object of JSON lines may lack some) -> those that are wanted.

Raises DataError.
"""

TableRow = tuple[int, tuple[Any, ...]]
"""(its line in the file, or its number from 1 in Parquet; the cells of the wanted columns, None where there is nothing)."""

_OPEN = 4
"""Readers kept open: one for each thread that reads on through a file."""


class TableFault(DataError):
    """A Parquet file is damaged, or unfit to hold clips."""


def rows(file: BinaryIO, place: str, choose: Choose, at_once: int = _BATCH) -> Iterator[TableRow]:
    """place: the file's name, which tells its format, for messages. at_once: rows of Parquet in memory.

    Raises DataError, and OSError from the file.
    """
    suffix = place.rpartition(".")[2].lower()
    if suffix == "parquet":
        yield from _parquet(file, place, choose, at_once)
    elif suffix in ("jsonl", "ndjson"):
        yield from _json(file, place, choose)
    else:
        yield from _csv(file, place, choose, "\t" if suffix == "tsv" else ",")


def _csv(file: BinaryIO, place: str, choose: Choose, delimiter: str) -> Iterator[TableRow]:
    """UTF-8, a first row of names, by which another delimiter is known; empty lines are passed over."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    reader = csv.reader(text)
    try:
        header = text.readline(_LONGEST_HEADER)
        if delimiter not in header:
            delimiter = max((delimiter, ";", "\t", ",", "|"), key=header.count)
        # strict: else a quote that is never closed takes the rest of the file for one cell, without an error.
        reader = csv.reader(chain([header] if header else [], text), delimiter=delimiter, strict=True)
        names = [name.strip() for name in next(reader, [])]
        wanted = [names.index(name) for name in choose(names, True)]
        for cells in reader:
            if len(cells) > len(names):
                what = f"the row has {len(cells)} cells, and there are {len(names)} columns."
                raise _wrong(place, reader.line_num, what, "Put cells that hold commas in quotes.")
            if any(cell.strip() for cell in cells):
                padded = [*cells, *[""] * (len(names) - len(cells))]
                yield reader.line_num, tuple(padded[number] or None for number in wanted)
    except UnicodeDecodeError as error:
        raise _wrong(place, 0, f"it is not UTF-8 ({error.reason}).", "Save it as UTF-8.") from error
    except csv.Error as error:
        raise _wrong(place, reader.line_num, f"it is not CSV: {error}.", "Fix the line.") from error


def _json(file: BinaryIO, place: str, choose: Choose) -> Iterator[TableRow]:
    """An object a line. The first one has to have the columns that are needed; a later one may lack some."""
    wanted: Sequence[str] | None = None
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError is one
            what = "it is longer than 16 MiB" if len(line) == _LONGEST_LINE else f"it is not JSON ({error})"
            raise _wrong(place, number, f"{what}.", "Write one JSON object a line.") from error
        except RecursionError:
            raise _wrong(place, number, "it is nested too deep.", "Write one flat JSON object a line.") from None
        if not isinstance(found, dict):
            raise _wrong(place, number, "it is no JSON object.", 'Write objects, such as {"path": "a.mp4"}.')
        wanted = choose(list(found), False) if wanted is None else wanted
        yield number, tuple(found.get(name) for name in wanted)


def _parquet(file: BinaryIO, place: str, choose: Choose, at_once: int) -> Iterator[TableRow]:
    """Row groups are streamed. A column in a struct is called "struct.field"."""
    number = 0
    with arrow_errors(place):
        table = open_parquet(file)
        wanted = choose(columns_of(table), True)
        if at_once == 1:
            _check_groups(table, place, wanted)
        for batch in table.iter_batches(at_once, columns=list(dict.fromkeys(wanted))):
            cells = [cell_of(batch, name) for name in wanted]
            for row in zip(*(column.to_pylist() for column in cells), strict=True):
                number += 1
                yield number, row


def _check_groups(table: Any, place: str, wanted: Sequence[str]) -> None:
    """A row of bytes is read with the others of its page, at worst with its whole row group. Raises DataError."""
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        chunks = (about.column(number) for number in range(about.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in wanted)
        if size > LARGEST_GROUP:
            what = f"row group {group} holds {size:,} bytes, and at most {LARGEST_GROUP:,} are read at once."
            raise TableFault(Problem(place, what, "Write the file with smaller row groups (row_group_size)."))


def open_parquet(file: BinaryIO) -> Any:
    """pyarrow's ParquetFile, which reads a buffer at a time instead of whole columns. Within `arrow_errors`."""
    from pyarrow import parquet

    return parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)


def columns_of(table: Any) -> list[str]:
    """Names of a ParquetFile's columns, those in structs too."""
    names = []
    for field in table.schema_arrow:
        names.append(str(field.name))
        if hasattr(field.type, "fields"):
            names += [f"{field.name}.{inner.name}" for inner in field.type.fields]
    return names


def cell_of(batch: Any, name: str) -> Any:
    """A column of a record batch, or a field of one."""
    if name in batch.schema.names:
        return batch.column(name)
    outer, _, inner = name.partition(".")
    return batch.column(outer).field(inner)


@contextmanager
def arrow_errors(place: str) -> Iterator[None]:
    """Turns what pyarrow raises, and its absence, into DataError."""
    try:
        from pyarrow import ArrowException
    except ImportError as error:
        what = "reading Parquet needs the package pyarrow."
        raise DataError(Problem(place, what, "Install it: pip install 'vtrain[parquet]'")) from error
    try:
        yield
    except (ArrowException, OSError) as error:
        # pyarrow raises a bare OSError, without a number, for a file that is damaged.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # the storage's own
        text = " ".join(str(error).split())[:300]
        raise TableFault(
            Problem(place, f"it is no Parquet file that can be read: {text}.", "Write it again.")
        ) from error


def _wrong(place: str, line: int, what: str, remedy: str) -> DataError:
    return DataError(Problem(f"{place}:{line}" if line else place, what, remedy))


class ColumnReader:
    """Reads on through a column. at: the number of the row that comes next, from 1."""

    def __init__(self, folder: Folder, name: str, column: str) -> None:
        self.name = name
        self._file = folder.open(SourceRef(name, 0, ""))
        self._table: Any = open_parquet(self._file)
        self._column = column
        self._ends: list[int] = []
        rows = 0
        for group in range(self._table.num_row_groups):
            rows += self._table.metadata.row_group(group).num_rows
            self._ends.append(rows)
        self._cells: Iterator[Any] = iter(())
        self.at = 0
        self._last = -1

    def group_of(self, number: int) -> int | None:
        """The row group that holds a row."""
        return next((group for group, end in enumerate(self._ends) if number <= end), None)

    def leads_to(self, number: int) -> bool:
        """Whether the row comes later in the row group that is being read."""
        return self._last >= 0 and self.at <= number and self.group_of(number) == self._last

    def read(self, number: int) -> bytes | None:
        """A row group is read from its start up to the row. None if there is no such row."""
        if not self.leads_to(number):
            group = self.group_of(number)
            if group is None:
                return None
            self._last, self.at = group, 1 + (self._ends[group - 1] if group else 0)
            self._cells = self._read_group(group)
        while self.at < number:
            next(self._cells)
            self.at += 1
        self.at += 1
        value = next(self._cells).as_py()
        return value if isinstance(value, bytes) else b"" if value is None else None

    def close(self) -> None:
        self._file.close()

    def _read_group(self, group: int) -> Iterator[Any]:
        for batch in self._table.iter_batches(1, row_groups=[group], columns=[self._column]):
            yield from cell_of(batch, self._column)


class TableCells:
    """A column's cells. Threads may share it; rows that are asked for in order are read in one pass."""

    def __init__(self, folder: Folder, column: str) -> None:
        self._folder, self._column = folder, column
        self._idle: list[ColumnReader] = []
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[TableCells], tuple[Folder, str]]:
        return type(self), (self._folder, self._column)

    def read(self, name: str, number: int) -> bytes | None:
        """None if there is no such row. Raises OSError and DataError."""
        with arrow_errors(f"{self._folder.location}/{name}"):
            reader = self._take(name, number) or ColumnReader(self._folder, name, self._column)
            try:
                data = reader.read(number)
            except BaseException:
                reader.close()
                raise
        with self._lock:
            self._idle.append(reader)
            surplus = self._idle[:-_OPEN]
            del self._idle[:-_OPEN]
        for old in surplus:
            old.close()
        return data

    def forget(self, name: str) -> None:
        """Open the file again: it has changed."""
        with self._lock:
            stale = [reader for reader in self._idle if reader.name == name]
            self._idle = [reader for reader in self._idle if reader.name != name]
        for reader in stale:
            reader.close()

    def _take(self, name: str, number: int) -> ColumnReader | None:
        """The idle reader that is nearest before the row, else any of the file."""
        with self._lock:
            own = [reader for reader in self._idle if reader.name == name]
            ahead = [reader for reader in own if reader.leads_to(number)]
            chosen = max(ahead, key=lambda reader: reader.at) if ahead else next(iter(own), None)
            if chosen is not None:
                self._idle.remove(chosen)
            return chosen
