"""Names and rows in order, whatever their number: many are sorted on disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain, islice

_IN_MEMORY = 1 << 16
"""Names that are sorted in memory."""


def in_order(names: Iterable[str]) -> Iterator[str]:
    """Sorted by code points. Beyond 65,536 a temporary file is used."""
    remaining = iter(names)
    first = list(islice(remaining, _IN_MEMORY))
    more = next(remaining, None)
    if more is None:
        first.sort()
        yield from first
        return
    rows = ((name, "") for name in chain(first, (more,), remaining))
    del first
    for name, _ in sorted_rows(rows):
        yield name


def sorted_rows(rows: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(key, text) by key, equal keys in the order given; sorted in a temporary file. Any text, lone surrogates too."""
    with closing(sqlite3.connect("", check_same_thread=False)) as database:  # "": a file without a name
        database.execute("PRAGMA cache_size = -16384")
        database.execute("CREATE TABLE row (key BLOB, number INTEGER PRIMARY KEY, text BLOB)")
        database.executemany(
            "INSERT INTO row (key, text) VALUES (?, ?)",
            ((key.encode("utf-8", "surrogatepass"), text.encode("utf-8", "surrogatepass")) for key, text in rows),
        )
        for key, text in database.execute("SELECT key, text FROM row ORDER BY key, number"):
            yield key.decode("utf-8", "surrogatepass"), text.decode("utf-8", "surrogatepass")
