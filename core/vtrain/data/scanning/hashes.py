"""Content hashes of model files, computed once."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from vtrain.data.scanning.database import Layout, database_faults, open_database

FILE = "hashes.sqlite"

_LAYOUT = Layout(
    application_id=0x76744831,
    version=1,
    tables="CREATE TABLE IF NOT EXISTS file (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 TEXT);",
)


def moved_aside(folder: Path) -> str | None:
    """Open the hashes of a cache folder once, if there are any: what became of a damaged or foreign file, or None.

    Raises DataError.
    """
    path = folder / FILE
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
