"""SQLite files in the cache folder: opened, told apart from foreign ones, and moved aside when damaged."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from vtrain.contract import DataError, Problem

_BUSY_SECONDS = 30.0


@dataclass(frozen=True)
class Layout:
    """What makes a file ours. application_id: in its header; version: of the tables; tables: SQL that makes them."""

    application_id: int
    version: int
    tables: str


@contextmanager
def database_faults(path: Path) -> Iterator[None]:
    """Turn SQLite's errors and the storage's into DataError."""
    try:
        yield
    except sqlite3.Error as error:
        remedy = {
            "database is locked": "Another run uses this cache folder: let it finish.",
            "database or disk is full": "Free space on the disk.",
        }.get(str(error), "Check the folder, or set cache.dir to another.")
        raise DataError(Problem(str(path), f"cannot be read or written: {error}.", remedy)) from error


def make_folder(folder: Path) -> None:
    """Create the cache folder. Raises DataError if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the cache folder cannot be written: {error.strerror or error}."
        raise DataError(Problem(str(folder), what, "Set cache.dir to a folder that can be.")) from error


def open_database(path: Path, layout: Layout) -> tuple[sqlite3.Connection, str | None]:
    """A connection for writing, and a message if what lay there was moved aside. Raises DataError."""
    make_folder(path.parent)
    with database_faults(path):
        try:
            return _connect(path, layout), None
        except sqlite3.OperationalError:
            raise
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            aside = _move_aside(path)
            return _connect(path, layout), f"{path} was damaged or not ours ({error}): moved to {aside}, and made anew"


def open_readonly(path: Path) -> sqlite3.Connection:
    """A connection that can write nothing, usable in any thread, one at a time. Raises sqlite3.Error."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_SECONDS, check_same_thread=False
    )


def _connect(path: Path, layout: Layout) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
    try:
        if not _is_ours(connection, layout):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(
                f"BEGIN; {layout.tables} PRAGMA application_id = {layout.application_id}; "
                f"PRAGMA user_version = {layout.version}; COMMIT;"
            )
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_ours(connection: sqlite3.Connection, layout: Layout) -> bool:
    """False for an empty file. Raises sqlite3.DatabaseError for one that is damaged or holds something else."""
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(str(found).strip())
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (owner,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if tables and (owner, version) != (layout.application_id, layout.version):
        raise sqlite3.DatabaseError(f"application {owner}, version {version}")
    return bool(tables)


def _move_aside(path: Path) -> Path:
    """Rename a database, its journal with it, to a name that is free."""
    aside = next(new for n in count(1) if not (new := path.with_name(f"{path.name}.damaged-{n}")).exists())
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    return aside
