"""Single cells of a column of Parquet files, found by the number of their row."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any

from vtrain.contract import SourceRef
from vtrain_builtin.files import Folder
from vtrain_builtin.rows import arrow_errors, cell_of, open_parquet

_OPEN = 4
"""Readers kept open: one for each thread that reads on through a file."""


class Reader:
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


class Cells:
    """A column's cells. Threads may share it; rows that are asked for in order are read in one pass."""

    def __init__(self, folder: Folder, column: str) -> None:
        self._folder, self._column = folder, column
        self._idle: list[Reader] = []
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Cells], tuple[Folder, str]]:
        return type(self), (self._folder, self._column)

    def read(self, name: str, number: int) -> bytes | None:
        """None if there is no such row. Raises OSError and DataError."""
        with arrow_errors(f"{self._folder.location}/{name}"):
            reader = self._take(name, number) or Reader(self._folder, name, self._column)
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
        """Open the file anew: it has changed."""
        with self._lock:
            stale = [reader for reader in self._idle if reader.name == name]
            self._idle = [reader for reader in self._idle if reader.name != name]
        for reader in stale:
            reader.close()

    def _take(self, name: str, number: int) -> Reader | None:
        """The idle reader that is nearest before the row, else any of the file."""
        with self._lock:
            own = [reader for reader in self._idle if reader.name == name]
            ahead = [reader for reader in own if reader.leads_to(number)]
            chosen = max(ahead, key=lambda reader: reader.at) if ahead else next(iter(own), None)
            if chosen is not None:
                self._idle.remove(chosen)
            return chosen
