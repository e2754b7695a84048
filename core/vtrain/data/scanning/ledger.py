"""The ledger: an SQLite database in the cache folder with a row for each source file, and the kinds of files that stand in it."""

from __future__ import annotations

import json
import posixpath
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any

from vtrain.contract import SourceRef, Words
from vtrain.data.decoding.probe import PROBE_VERSION, Probe
from vtrain.data.decoding.video import IMAGE_SUFFIXES, SUFFIXES
from vtrain.data.sample import Sample, Skipped
from vtrain.data.scanning.captions import BESIDE
from vtrain.data.scanning.database import DatabaseTables, database_faults, open_database, open_readonly

VIDEO, IMAGE, OTHER, MISNAMED = "video", "image", "other", "misnamed"
CLIPS = (VIDEO, IMAGE)
"""Kinds that give samples."""

_KINDS = {
    **dict.fromkeys(SUFFIXES, VIDEO),
    **dict.fromkeys(IMAGE_SUFFIXES, IMAGE),
    **BESIDE,
}

_ANIMATED = {
    ".webp": " (an animated WebP is not read: save it as MP4 or GIF)",
    ".png": " (an animated PNG: of all its frames)",
}
_UNREAD = frozenset((".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".exr", ".tga", ".dng"))
"""Lower-case suffixes of pictures that are no clips."""

KINDS_VERSION = tuple(sorted(_KINDS.items()))
"""What decides over kinds: a ledger holds them."""


def hidden(ref_id: str) -> bool:
    """Whether a file, or a folder that it is in, has a name that starts with a dot."""
    return ref_id[0] == "." or "/." in ref_id


def kind_of(ref_id: str) -> str:
    """VIDEO, IMAGE, a setting of data.captions for a caption file, or OTHER."""
    return _KINDS.get(suffix_of(ref_id), OTHER)


def suffix_of(ref_id: str) -> str:
    return posixpath.splitext(ref_id)[1].lower()


def is_utf8(name: str) -> bool:
    """Whether a name can be written down; other bytes of a file name arrive as lone surrogates."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(name: str) -> str:
    """A name that is not UTF-8, as it can be written down."""
    return name.encode(errors="backslashreplace").decode()


def useless(ref_id: str, kind: str) -> Skipped:
    """Why a file that is no clip is skipped."""
    if kind == MISNAMED:
        return Skipped("dropped", "bad name", "its name is not UTF-8: rename it")
    if kind == IMAGE:
        more = _ANIMATED.get(suffix_of(ref_id), "")
        reason = f"a single image: set data.images = true to use it as a clip of one frame{more}"
        return Skipped("dropped", "image", reason)
    if suffix_of(ref_id) in _UNREAD:
        name = suffix_of(ref_id)[1:].upper()
        reason = f"an image that is not read ({name}): save it as PNG or JPEG, an animated one as MP4 or GIF"
        return Skipped("dropped", "image", reason)
    return Skipped("dropped", "not a video", f"not a video: {suffix_of(ref_id) or 'no suffix'}")


FILE = "ledger.sqlite"

WORDS_VERSION = 2
"""Raised when what is kept of a caption file changes. 2: all its keys, whoever reads them."""

PAGE = 1000
"""Rows that are read, or written in one transaction, at once."""

# source_unseen is partial: what is to be opened is found without a walk over all files that are known.
_TABLES = """
    CREATE TABLE place (number INTEGER PRIMARY KEY, location TEXT UNIQUE NOT NULL, generation INTEGER NOT NULL);
    CREATE TABLE shard (place INTEGER, ref TEXT, size INTEGER, version TEXT, PRIMARY KEY (place, ref)) WITHOUT ROWID;
    CREATE TABLE source (
        place INTEGER, ref TEXT, kind TEXT NOT NULL, stem TEXT NOT NULL, size INTEGER NOT NULL, version TEXT NOT NULL,
        generation INTEGER NOT NULL, unseen INTEGER NOT NULL, fault TEXT, probe TEXT, words TEXT, sha256 TEXT,
        PRIMARY KEY (place, ref)
    ) WITHOUT ROWID;
    CREATE INDEX source_by_stem ON source (place, stem, kind);
    CREATE INDEX source_unseen ON source (place, kind, ref) WHERE unseen;
    CREATE TABLE dataset_caption (place INTEGER, origin TEXT, name TEXT, words TEXT NOT NULL, PRIMARY KEY (place, origin, name))
        WITHOUT ROWID;
    CREATE TABLE decision (
        number INTEGER PRIMARY KEY, settings TEXT UNIQUE NOT NULL, place INTEGER NOT NULL, generation INTEGER NOT NULL,
        statistics TEXT
    );
    CREATE TABLE file_decision (
        decision INTEGER, ref TEXT, size INTEGER NOT NULL, version TEXT NOT NULL, status TEXT NOT NULL,
        kind TEXT NOT NULL, reason TEXT NOT NULL, frames INTEGER, height INTEGER, width INTEGER,
        samples INTEGER NOT NULL, windows INTEGER NOT NULL, stretch REAL NOT NULL, cropped REAL NOT NULL,
        aspect REAL, made TEXT, captions TEXT, mask TEXT NOT NULL, looks TEXT NOT NULL, PRIMARY KEY (decision, ref)
    ) WITHOUT ROWID;
    CREATE TABLE token_survey (decision INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, generation INTEGER NOT NULL,
        summary TEXT NOT NULL);
    CREATE TABLE texts (decisions TEXT PRIMARY KEY, generations TEXT NOT NULL, count INTEGER NOT NULL) WITHOUT ROWID;
"""
"""source: unseen is 1 for a file that was not opened yet, or could not be for a reason that may pass. words: of a caption
file. dataset_caption: captions that do not stand in a file of their own. file_decision: made is how a file's samples are
cut, as JSON; captions are those of each of its samples; samples and windows are how many there are; stretch, cropped and
aspect are its Fit's; looks is what its caption file looks like (captions.looks_like). decision: statistics is what a scan
counted of it; token_survey: how much its captions take of the text encoder. A file that failed in filling keeps `made` until
the next scan, so that those who go through the samples count alike.
"""

_PROBE = attrgetter(*(field.name for field in fields(Probe)))

_LAYOUT = DatabaseTables(
    application_id=0x76744C31,  # "vtL1"
    # Any other tables, fields of a probe or kinds of files are another layout, and are scanned again.
    # >> 1: SQLite's user_version is a signed number of 32 bits.
    version=zlib.crc32(
        repr((PROBE_VERSION, WORDS_VERSION, _TABLES, [field.name for field in fields(Probe)], KINDS_VERSION)).encode()
    )
    >> 1,
    tables=_TABLES,
)


@dataclass(frozen=True, slots=True)
class Source:
    """A file as the ledger knows it. kind: as `kind_of` says. fault: why it cannot be used, else None."""

    size: int
    version: str
    kind: str
    fault: str | None = None
    probe: Probe | None = None
    words: Words | None = None
    content: str = ""


@dataclass(frozen=True, slots=True)
class FileDecision:
    """What became of a file under one dataset's settings.

    status: "used", "dropped" or "failed". shape: "WxH@F", or "". kind, reason: why it is skipped, or "".
    """

    size: int
    version: str
    status: str
    shape: str = ""
    kind: str = ""
    reason: str = ""


class Ledger(AbstractContextManager["Ledger"]):
    """The ledger of a cache folder, open for reading and writing. Every method raises DataError.

    message: what happened to a damaged, older or foreign file that lay in its place, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._db, self.message = open_database(self.path, _LAYOUT)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Writes that are done together or not at all."""
        with database_faults(self.path), self._db:
            yield self._db

    def rows(self, query: str, values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        with database_faults(self.path):
            return self._db.execute(query, values).fetchall()

    def pages(self, query: str, values: Mapping[str, object]) -> Iterator[tuple[Any, ...]]:
        """Rows of a query that holds "> :after", orders by its first column and ends in "LIMIT :limit".

        The ledger may be written to between one row and the next.
        """
        return pages(self._db, self.path, query, values)

    def place(self, location: str) -> int:
        """The number of a place, new or known."""
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO place (location, generation) VALUES (?, 0)", (location,))
            return int(db.execute("SELECT number FROM place WHERE location = ?", (location,)).fetchone()[0])

    def generation(self, place: int) -> int:
        return int(self.rows("SELECT generation FROM place WHERE number = :place", {"place": place})[0][0])

    def sources(self, location: str) -> dict[str, Source]:
        """Ref id -> what is known, of one place; all of it in memory."""
        query = """SELECT ref, size, version, source.kind, fault, probe, words, sha256 FROM source JOIN place ON place = number
            WHERE location = :location"""
        return {
            ref: Source(size, version, kind, fault, probe_of(probe), words_of(words), sha256 or "")
            for ref, size, version, kind, fault, probe, words, sha256 in self.rows(query, {"location": location})
        }

    def file_decisions(self, settings: str) -> dict[str, FileDecision]:
        """Ref id -> decision, under one dataset's settings; all of them in memory."""
        query = """SELECT ref, size, version, status, width || 'x' || height || '@' || frames, kind, reason
            FROM file_decision JOIN decision ON decision = number WHERE settings = :settings"""
        return {
            ref: FileDecision(size, version, status, shape or "", kind, reason)
            for ref, size, version, status, shape, kind, reason in self.rows(query, {"settings": settings})
        }

    def record_skipped(self, settings: str, sample: Sample, left: Skipped) -> None:
        """Why a file cannot be used as its sample under these settings asks, found when it was read: from the next scan on
        it is used no more, until it changes."""
        with self.transaction() as db:
            db.execute(
                # By size and version: a file that was replaced since is not the one that failed.
                "UPDATE file_decision SET status = ?, kind = ?, reason = ? "
                "WHERE decision = (SELECT number FROM decision WHERE settings = ?) AND ref = ? AND size = ? AND version = ?",
                (left.status, left.kind, left.reason, settings, sample.ref_id, sample.size, sample.version),
            )
            db.execute("UPDATE decision SET statistics = NULL WHERE settings = ?", (settings,))
            db.execute("DELETE FROM texts")  # its captions may be no other file's
            db.execute(
                "DELETE FROM token_survey WHERE decision = (SELECT number FROM decision WHERE settings = ?)",
                (settings,),
            )

    def record_hash(self, location: str, ref: SourceRef, sha256: str) -> None:
        """The hash of the bytes that were read of a file."""
        with self.transaction() as db:
            db.execute(
                "UPDATE source SET sha256 = ? WHERE place = (SELECT number FROM place WHERE location = ?) AND ref = ? "
                "AND size = ? AND version = ?",
                (sha256, location, ref.id, ref.size, ref.version),
            )


class ContentHashes:
    """The ledger's content hashes, read-only. Each process opens its own, never one from before a fork."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._db: sqlite3.Connection | None = None

    def of(self, location: str, ref: SourceRef) -> str | None:
        """The content hash of a file, or None if its bytes were not read yet. Raises DataError."""
        query = """SELECT sha256 FROM source WHERE place = (SELECT number FROM place WHERE location = ?) AND ref = ?
            AND size = ? AND version = ?"""
        with database_faults(self.path):
            if self._db is None:
                self._db = open_readonly(self.path)
            row = self._db.execute(query, (location, ref.id, ref.size, ref.version)).fetchone()
        return row[0] if row else None


def pages(db: sqlite3.Connection, path: Path, query: str, values: Mapping[str, object]) -> Iterator[tuple[Any, ...]]:
    """`Ledger.pages` on any connection."""
    after = ""
    while True:
        with database_faults(path):
            # By the last name and not by OFFSET, which would count rows that came or went in between.
            rows = db.execute(query, {**values, "after": after, "limit": PAGE}).fetchall()
        yield from rows
        if len(rows) < PAGE:
            return
        after = rows[-1][0]


def probe_of(text: str | None) -> Probe | None:
    """What `probe_text` wrote."""
    return None if text is None else Probe(*json.loads(text))


def probe_text(probe: Probe) -> str:
    return json.dumps(_PROBE(probe), separators=(",", ":"))


def words_of(text: str | None) -> Words | None:
    """What `words_text` wrote."""
    if text is None:
        return None
    texts, extras = json.loads(text)
    return Words(tuple(texts), extras)


def words_text(words: Words) -> str:
    text = json.dumps([words.texts, dict(words.extras)], ensure_ascii=False, separators=(",", ":"))
    # An extra that no family reads may hold half a character.
    return text if is_utf8(text) else json.dumps(json.loads(text))


def marks(values: Sequence[object]) -> str:
    """ "?, ?, ?" for so many values."""
    return ", ".join("?" * len(values))
