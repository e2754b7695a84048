"""The ledger: every source file of every dataset, what its header says, its content hash, and what became of it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vtrain.contract import Words
from vtrain.data.database import Layout, database_faults, open_database, open_readonly
from vtrain.data.probe import Probe
from vtrain.data.sample import Sample

FILE = "ledger.sqlite"

_LAYOUT = Layout(
    application_id=0x76744C31,
    version=2,
    tables="""
    CREATE TABLE IF NOT EXISTS source (
        location TEXT, ref TEXT, size INTEGER, version TEXT, fault TEXT, caption TEXT, codec TEXT, width INTEGER,
        height INTEGER, pixel_aspect REAL, frames INTEGER, duration REAL, sha256 TEXT, PRIMARY KEY (location, ref)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS fate (
        settings TEXT, ref TEXT, size INTEGER, version TEXT, status TEXT, shape TEXT, kind TEXT, reason TEXT,
        PRIMARY KEY (settings, ref)
    ) WITHOUT ROWID;
    """,
)


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of a file of this size and version: its probe or its words, or the fault of either."""

    size: int
    version: str
    fault: str | None = None
    probe: Probe | None = None
    words: Words | None = None


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a file under one dataset's settings.

    status: "used", "dropped" or "failed". shape: "WxH@F", or "". kind, reason: why it is left out, or "".
    """

    size: int
    version: str
    status: str
    shape: str = ""
    kind: str = ""
    reason: str = ""


class Ledger(AbstractContextManager["Ledger"]):
    """The ledger of a cache folder, open for writing; one process writes. Every method raises DataError.

    message: what happened to a damaged or foreign file that lay in its place, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._db, self.message = open_database(self.path, _LAYOUT)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def sources(self, location: str) -> dict[str, Source]:
        """Ref id -> what is known, of one place."""
        found = {}
        with database_faults(self.path):
            for ref, size, version, fault, caption, *header in self._db.execute(
                "SELECT ref, size, version, fault, caption, codec, width, height, pixel_aspect, frames, duration "
                "FROM source WHERE location = ?",
                (location,),
            ):
                probe = Probe(*header) if header[0] is not None else None
                found[ref] = Source(size, version, fault, probe, _words(caption))
        return found

    def record_sources(self, location: str, sources: Mapping[str, Source]) -> None:
        """Insert or replace; the content hash of a replaced row is forgotten."""
        with database_faults(self.path), self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO source VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (
                    (location, ref, s.size, s.version, s.fault, _text(s.words), *_columns(s.probe))
                    for ref, s in sources.items()
                ),
            )

    def forget_sources(self, location: str, refs: Iterable[str]) -> None:
        with database_faults(self.path), self._db:
            self._db.executemany("DELETE FROM source WHERE location = ? AND ref = ?", ((location, ref) for ref in refs))

    def fates(self, settings: str) -> dict[str, Fate]:
        """Ref id -> fate, under one dataset's settings."""
        query = "SELECT ref, size, version, status, shape, kind, reason FROM fate WHERE settings = ?"
        with database_faults(self.path):
            return {ref: Fate(*columns) for ref, *columns in self._db.execute(query, (settings,))}

    def record_fates(self, settings: str, fates: Mapping[str, Fate]) -> None:
        with database_faults(self.path), self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO fate VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                ((settings, ref, f.size, f.version, f.status, f.shape, f.kind, f.reason) for ref, f in fates.items()),
            )

    def forget_fates(self, settings: str, refs: Iterable[str]) -> None:
        with database_faults(self.path), self._db:
            self._db.executemany("DELETE FROM fate WHERE settings = ? AND ref = ?", ((settings, ref) for ref in refs))

    def record_hash(self, location: str, sample: Sample, sha256: str) -> None:
        """The hash of the bytes that were read for a sample."""
        with database_faults(self.path), self._db:
            self._db.execute(
                "UPDATE source SET sha256 = ? WHERE location = ? AND ref = ? AND size = ? AND version = ?",
                (sha256, location, sample.ref_id, sample.size, sample.version),
            )


class ContentHashes:
    """The ledger's content hashes, read-only. Each process opens its own, never one from before a fork."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._db: sqlite3.Connection | None = None

    def of(self, location: str, sample: Sample) -> str | None:
        """The content hash of a sample's file, or None if its bytes were not read yet. Raises DataError."""
        query = "SELECT sha256 FROM source WHERE location = ? AND ref = ? AND size = ? AND version = ?"
        with database_faults(self.path):
            if self._db is None:
                self._db = open_readonly(self.path)
            row = self._db.execute(query, (location, sample.ref_id, sample.size, sample.version)).fetchone()
        return row[0] if row else None


def _words(text: str | None) -> Words | None:
    """What `_text` wrote."""
    if text is None:
        return None
    texts, extras = json.loads(text)
    return Words(tuple(texts), extras)


def _text(words: Words | None) -> str | None:
    return None if words is None else json.dumps([words.texts, dict(words.extras)], ensure_ascii=False)


def _columns(probe: Probe | None) -> tuple[object, ...]:
    if probe is None:
        return (None,) * 6
    return (probe.codec, probe.width, probe.height, probe.pixel_aspect, probe.frames, probe.duration)
