"""Writing what changed in a place: rows in small transactions, all under one new generation of the place."""

from __future__ import annotations

import sqlite3

from vtrain.contract import SourceRef, Words
from vtrain.data.decoding.probe import Probe
from vtrain.data.decoding.video import FileFault
from vtrain.data.scanning.captions import BESIDE, stem
from vtrain.data.scanning.ledger import Ledger, probe_text, words_text
from vtrain.data.scanning.listing import CLIPS, kind_of

_ROWS = 256
"""Rows per transaction: an interrupted scan loses at most these."""

_BESIDE = frozenset(BESIDE.values())


class Changes:
    """The changes that one scan makes to one place. The generation moves with the first of them, or not at all."""

    def __init__(self, ledger: Ledger, place: int) -> None:
        self.ledger, self.place = ledger, place
        self._generation: int | None = None
        self._found: list[tuple[object, ...]] = []
        self._gone: list[str] = []
        self._seen: list[tuple[object, ...]] = []
        self._told: list[tuple[str, str, str | None]] = []
        self._stems: set[str] = set()

    def found(self, ref: SourceRef, kind: str | None = None) -> None:
        """A file is new, or another than it was."""
        kind = kind or kind_of(ref.id)
        self._touch(ref.id, kind)
        unseen = int(kind in CLIPS or kind in _BESIDE)
        self._found.append((ref.id, kind, stem(ref.id), ref.size, ref.version, unseen))
        self._maybe_write()

    def gone(self, ref_id: str) -> None:
        """A file is there no more."""
        self._touch(ref_id, kind_of(ref_id))
        self._gone.append(ref_id)
        self._maybe_write()

    def seen(self, ref_id: str, outcome: Probe | Words | FileFault) -> None:
        """What a file holds, or why it cannot be used. It is looked at again if that may pass."""
        fault = outcome.reason if isinstance(outcome, FileFault) else None
        unseen = int(isinstance(outcome, FileFault) and not outcome.lasting)
        probe = probe_text(outcome) if isinstance(outcome, Probe) else None
        words = words_text(outcome) if isinstance(outcome, Words) else None
        self._touch(ref_id, kind_of(ref_id))
        self._seen.append((unseen, fault, probe, words, ref_id))
        self._maybe_write()

    def told(self, origin: str, name: str, words: str | None) -> None:
        """A clip's captions that stand in no file of their own; None if it has none any more."""
        self._told.append((origin, name, words))
        self._maybe_write()

    def _touch(self, ref_id: str, kind: str) -> None:
        """Clips beside a caption file that changed are to be decided again."""
        if kind in _BESIDE:
            self._stems.add(stem(ref_id))

    def _maybe_write(self) -> None:
        if len(self._found) + len(self._gone) + len(self._seen) + len(self._told) >= _ROWS:
            self.write()

    def write(self) -> None:
        """Put down what is noted."""
        if not (self._found or self._gone or self._seen or self._told):
            return
        with self.ledger.transaction() as db:
            self._write(db, self._next_generation(db))
        for noted in (self._found, self._gone, self._seen, self._told):
            noted.clear()
        self._stems.clear()

    def _next_generation(self, db: sqlite3.Connection) -> int:
        """With the first change, in its transaction: a scan that is cut off leaves none unnoticed."""
        if self._generation is None:
            query = "UPDATE place SET generation = generation + 1 WHERE number = ? RETURNING generation"
            self._generation = int(db.execute(query, (self.place,)).fetchall()[0][0])
        return self._generation

    def _write(self, db: sqlite3.Connection, generation: int) -> None:
        place = self.place
        db.executemany("DELETE FROM source WHERE place = ? AND ref = ?", ((place, ref) for ref in self._gone))
        db.executemany(
            "DELETE FROM fate WHERE decision IN (SELECT number FROM decision WHERE place = ?) AND ref = ?",
            ((place, ref) for ref in self._gone),
        )
        db.executemany(
            "INSERT OR REPLACE INTO source (place, generation, ref, kind, stem, size, version, unseen) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            ((place, generation, *row) for row in self._found),
        )
        db.executemany(
            "UPDATE source SET generation = ?, unseen = ?, fault = ?, probe = ?, words = ? WHERE place = ? AND ref = ?",
            ((generation, *row[:-1], place, row[-1]) for row in self._seen),
        )
        self._write_told(db)
        clips = [(generation, place, stem, kind, generation) for stem in self._stems for kind in CLIPS]
        clips += [(generation, place, stem(name), kind, generation) for _, name, _ in self._told for kind in CLIPS]
        db.executemany(
            # Left to itself SQLite would go through the whole place.
            "UPDATE source INDEXED BY source_by_stem SET generation = ? "
            "WHERE place = ? AND stem = ? AND kind = ? AND generation < ?",
            clips,
        )

    def _write_told(self, db: sqlite3.Connection) -> None:
        told = [(self.place, origin, name, words) for origin, name, words in self._told if words is not None]
        db.executemany("INSERT OR REPLACE INTO told VALUES (?, ?, ?, ?)", told)
        gone = [(self.place, origin, name) for origin, name, words in self._told if words is None]
        db.executemany("DELETE FROM told WHERE place = ? AND origin = ? AND name = ?", gone)
