"""SQLite databases in the cache folder, and the one that remembers the hashes of files."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from vtrain.contract import DataError, Problem

if sys.platform != "win32":
    import fcntl

_BUSY_SECONDS, _AGAIN_S = 30.0, 0.05


@dataclass(frozen=True)
class DatabaseTables:
    """What makes a file ours. application_id: in its header; version: of the tables; tables: SQL that makes them."""

    application_id: int
    version: int
    tables: str


@contextmanager
def database_faults(path: Path) -> Iterator[None]:
    """Turn SQLite's errors and the storage's into DataError."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
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


def open_database(path: Path, layout: DatabaseTables) -> tuple[sqlite3.Connection, str | None]:
    """A connection for writing, and a message if what lay there was moved aside. Raises DataError."""
    make_folder(path.parent)
    with database_faults(path):
        try:
            return _connect(path, layout), None
        # A DatabaseError too, yet no damage: a database that is locked, or a disk that is full, is left where it is.
        except sqlite3.OperationalError:
            raise
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            with _alone(path):
                return _made_again(path, layout)


def _made_again(path: Path, layout: DatabaseTables) -> tuple[sqlite3.Connection, str | None]:
    """As open_database, in place of one that was damaged a moment ago."""
    try:
        return _connect(path, layout), None  # another process was here before this one
    except sqlite3.OperationalError:
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        aside = _move_aside(path)
        return _connect(path, layout), f"{path} was damaged or not ours ({error}): moved to {aside}, and made again"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process makes this database again: it would take the new one for the damaged one."""
    with path.with_name(f".{path.name}.lock").open("ab") as file:
        if sys.platform != "win32":
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_readonly(path: Path) -> sqlite3.Connection:
    """A connection that can write nothing, usable in any thread, one at a time. Raises sqlite3.Error."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_SECONDS, check_same_thread=False
    )


def _connect(path: Path, layout: DatabaseTables) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
    try:
        if not _is_ours(connection, layout):
            _make(connection, layout)
        # In WAL mode a power cut then costs the last transactions, which are scanned again, and not the database.
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _make(connection: sqlite3.Connection, layout: DatabaseTables) -> None:
    """Its tables, in a file that was empty a moment ago: another run that starts in the same folder may be doing the same."""
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            # Readers of other processes continue while one writes. SQLite does not wait for others here, as it does elsewhere.
            connection.execute("PRAGMA journal_mode = WAL")
            # Tables and marks in one transaction: tables without our mark would be taken for somebody else's.
            connection.executescript(
                f"BEGIN IMMEDIATE; {layout.tables} PRAGMA application_id = {layout.application_id}; "
                f"PRAGMA user_version = {layout.version}; COMMIT;"
            )
            return
        except sqlite3.OperationalError as error:
            connection.rollback()
            if _is_ours(connection, layout):
                return  # the other was first
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(_AGAIN_S)


def _is_ours(connection: sqlite3.Connection, layout: DatabaseTables) -> bool:
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


HASHES = "hashes.sqlite"

_LAYOUT = DatabaseTables(
    application_id=0x76744831,  # "vtH1"
    version=1,
    tables="CREATE TABLE IF NOT EXISTS file (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 TEXT);",
)


def moved_aside(folder: Path) -> str | None:
    """Open the hashes of a cache folder once, if there are any: what became of a damaged or foreign file, or None.

    Raises DataError.
    """
    path = folder / HASHES
    if not path.exists():
        return None
    database, message = open_database(path, _LAYOUT)
    database.close()
    return message


class FileHashes:
    """SHA-256 of files, remembered by path, size and time of change in an SQLite file at `path`.

    A file of a hub snapshot is a link to `blobs/<its SHA-256>`: its name is taken for its hash, and nothing is read.
    Raises DataError if the SQLite file cannot be written, OSError if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, file: Path) -> str:
        target = file.resolve()
        if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name):
            return target.name
        status = target.stat()
        stamp = (str(target), status.st_size, status.st_mtime_ns)
        database, _ = open_database(self.path, _LAYOUT)
        try:
            with database_faults(self.path), database:
                query = "SELECT sha256 FROM file WHERE path = ? AND size = ? AND mtime_ns = ?"
                row = database.execute(query, stamp).fetchone()
            if row:
                return str(row[0])
            # No transaction is open meanwhile: gigabytes may be read.
            sha256 = file_sha256(target)
            with database_faults(self.path), database:
                database.execute("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?)", (*stamp, sha256))
        finally:
            database.close()
        return sha256


def file_sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
