"""A dataset's listing brought up to date with what the ledger knows: what is new, changed or gone."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator

from vtrain.contract import DataBackend, SourceRef, SupportsShards, Words
from vtrain.data.decoding.probe import Probe
from vtrain.data.decoding.video import FileFault, faults
from vtrain.data.decoding.worker import ProbeJob, Workers
from vtrain.data.scanning import captions
from vtrain.data.scanning.caption_rows import caption_rows
from vtrain.data.scanning.captions import BESIDE, stem
from vtrain.data.scanning.extras import declared
from vtrain.data.scanning.ledger import (
    CLIPS,
    MISNAMED,
    VIDEO,
    Ledger,
    escaped,
    hidden,
    is_utf8,
    kind_of,
    probe_text,
    words_text,
)
from vtrain.plan.records import DatasetPlan
from vtrain.registry.blame import PartFault

_ROWS = 256
"""Rows per transaction: an interrupted scan loses at most these."""

_BESIDE = frozenset(BESIDE.values())


class Changes:
    """The changes that one scan makes to one place. The generation moves with the first of them, or not at all."""

    def __init__(self, ledger: Ledger, place: int, dataset: DatasetPlan) -> None:
        self.ledger, self.place, self._dataset = ledger, place, dataset
        self._generation: int | None = None
        self._found: list[tuple[object, ...]] = []
        self._gone: list[str] = []
        self._seen: list[tuple[object, ...]] = []
        self._captions: list[tuple[str, str, str | None]] = []
        self._stems: set[str] = set()

    def fault(self, what: str) -> PartFault:
        """Of the data backend, to be raised."""
        return PartFault("data_backend", self._dataset.use, what, where=self._dataset.where)

    def unsorted(self, before: str, after: str) -> PartFault:
        """after: what was listed behind `before`, where it may not stand."""
        if before == after:
            return self.fault(f'it lists "{escaped(after)}" twice')
        said = f'"{escaped(after)}" comes after "{escaped(before)}"'
        return self.fault(f"the files are not listed in order of their ids: {said}")

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
        """What a file holds, or why it cannot be used. It is scanned again if that may pass."""
        fault = outcome.reason if isinstance(outcome, FileFault) else None
        unseen = int(isinstance(outcome, FileFault) and not outcome.lasting)
        probe = probe_text(outcome) if isinstance(outcome, Probe) else None
        words = words_text(outcome) if isinstance(outcome, Words) else None
        self._touch(ref_id, kind_of(ref_id))
        self._seen.append((unseen, fault, probe, words, ref_id))
        self._maybe_write()

    def caption(self, origin: str, name: str, words: str | None) -> None:
        """A clip's captions that stand in no file of their own; None if it has none any more."""
        self._captions.append((origin, name, words))
        self._maybe_write()

    def _touch(self, ref_id: str, kind: str) -> None:
        """Clips beside a caption file that changed are to be decided again."""
        if kind in _BESIDE:
            self._stems.add(stem(ref_id))

    def _maybe_write(self) -> None:
        if len(self._found) + len(self._gone) + len(self._seen) + len(self._captions) >= _ROWS:
            self.write()

    def write(self) -> None:
        """Put down what is noted."""
        if not (self._found or self._gone or self._seen or self._captions):
            return
        with self.ledger.transaction() as db:
            self._write(db, self._next_generation(db))
        for noted in (self._found, self._gone, self._seen, self._captions):
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
            "DELETE FROM file_decision WHERE decision IN (SELECT number FROM decision WHERE place = ?) AND ref = ?",
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
        self._write_captions(db)
        # Python 3.12.1 takes `stem` for a local of this function where a comprehension has a variable of that name.
        stems = [*self._stems, *(stem(name) for _, name, _ in self._captions)]
        clips = [(generation, place, each, kind, generation) for each in stems for kind in CLIPS]
        db.executemany(
            # Left to itself SQLite would go through the whole place.
            "UPDATE source INDEXED BY source_by_stem SET generation = ? "
            "WHERE place = ? AND stem = ? AND kind = ? AND generation < ?",
            clips,
        )

    def _write_captions(self, db: sqlite3.Connection) -> None:
        given = [(self.place, origin, name, words) for origin, name, words in self._captions if words is not None]
        db.executemany("INSERT OR REPLACE INTO dataset_caption VALUES (?, ?, ?, ?)", given)
        gone = [(self.place, origin, name) for origin, name, words in self._captions if words is None]
        db.executemany("DELETE FROM dataset_caption WHERE place = ? AND origin = ? AND name = ?", gone)


Known = tuple[str, int, str]
"""(ref id, size, version) of a row."""

_PENDING = """SELECT ref, size, version FROM source WHERE place = :place AND kind = :kind AND unseen AND ref > :after
    {beside} ORDER BY ref LIMIT :limit"""

_BESIDE_A_CLIP = """AND EXISTS (SELECT 1 FROM source clip WHERE clip.place = source.place AND clip.stem = source.stem
    AND clip.kind IN ('video', 'image'))"""


def refresh(ledger: Ledger, dataset: DatasetPlan, workers: Workers, count: Callable[[], None] | None = None) -> int:
    """The number of the dataset's place, whose rows are then true. count: called for each file that is done with.

    Raises DataError, and PartFault for files that are not listed as the contract says.
    """
    backend = dataset.backend
    place = ledger.place(backend.location)
    changes = Changes(ledger, place, dataset)
    if isinstance(backend, SupportsShards):
        _merge_shards(changes, backend, count)
    else:
        _merge(changes, backend.refs(), "", count)
    # Before files are opened: the ledger is asked which.
    changes.write()
    _merge_captions(changes, dataset)
    _look(changes, dataset, workers, count)
    changes.write()
    return place


def origin_of(dataset: DatasetPlan) -> str:
    """Names where captions that stand in no file of their own come from."""
    table = dataset.table
    parts = [dataset.captions, str(table.captions_file), table.file_column, table.caption_column, declared(dataset)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _merge(changes: Changes, listed: Iterator[SourceRef], shard: str, count: Callable[[], None] | None) -> None:
    """shard: the prefix of all ids that are listed, "" for a whole place."""
    # Both come in the order of code points (SQLite compares UTF-8 byte by byte), so neither is ever held as a whole.
    known = _known(changes, shard)
    row, last = next(known, None), ""
    misnamed: dict[str, SourceRef] = {}
    if not isinstance(listed, Iterable):
        raise changes.fault(f"it lists {listed!r}, not files")
    for ref in listed:
        if not isinstance(ref, SourceRef):
            raise changes.fault(f"it lists {ref!r}, which is no SourceRef")
        name = ref.id
        if name <= last:
            raise changes.unsorted(last, name)
        last = name
        if hidden(name):
            continue
        if not is_utf8(name):
            misnamed[escaped(name)] = ref
            continue
        while row is not None and row[0] < name:
            changes.gone(row[0])
            row = next(known, None)
        if row is not None and row[0] == name:
            if row[1] != ref.size or row[2] != ref.version:
                changes.found(ref)
            elif count is not None:
                count()
            row = next(known, None)
        else:
            changes.found(ref)
    while row is not None:
        changes.gone(row[0])
        row = next(known, None)
    _merge_misnamed(changes, shard, misnamed)


def _known(changes: Changes, shard: str) -> Iterator[Known]:
    """Rows of the place, or of one shard."""
    within = "AND ref > :first AND ref < :end" if shard else ""
    query = f"""SELECT ref, size, version FROM source WHERE place = :place AND ref > :after AND kind != 'misnamed' {within}
        ORDER BY ref LIMIT :limit"""
    return changes.ledger.pages(query, {"place": changes.place, "first": shard, "end": _end(shard)})


def _end(shard: str) -> str:
    """The first string after all that start with "<shard>/": "0" is the character after "/"."""
    return f"{shard[:-1]}0" if shard else ""


def _merge_misnamed(changes: Changes, shard: str, listed: dict[str, SourceRef]) -> None:
    """Names that are not UTF-8 have no order in common with the rest; they are few, and held in memory."""
    query = "SELECT ref, size, version FROM source WHERE place = :place AND kind = 'misnamed'"
    known = {ref: rest for ref, *rest in changes.ledger.rows(query, {"place": changes.place}) if ref.startswith(shard)}
    for ref_id in known.keys() - listed.keys():
        changes.gone(ref_id)
    for ref_id, ref in listed.items():
        if known.get(ref_id) != [ref.size, ref.version]:
            changes.found(SourceRef(ref_id, ref.size, ref.version), MISNAMED)


def _merge_shards(changes: Changes, backend: SupportsShards, count: Callable[[], None] | None) -> None:
    """List the members of shards that are new or changed; the ledger remembers the others."""
    values = {"place": changes.place}
    query = "SELECT ref, size, version FROM shard WHERE place = :place AND ref > :after ORDER BY ref LIMIT :limit"
    known = changes.ledger.pages(query, values)
    row, last = next(known, None), ""
    for shard in backend.shards():
        if shard.id <= last:
            raise changes.unsorted(last, shard.id)
        last = shard.id
        while row is not None and row[0] < shard.id:
            _forget_shard(changes, row[0])
            row = next(known, None)
        if row is None or row[0] != shard.id or row[1:] != (shard.size, shard.version):
            _list_shard(changes, backend, shard, count)
        if row is not None and row[0] == shard.id:
            row = next(known, None)
    while row is not None:
        _forget_shard(changes, row[0])
        row = next(known, None)


def _list_shard(changes: Changes, backend: SupportsShards, shard: SourceRef, count: Callable[[], None] | None) -> None:
    """A shard is written down as listed after all its members are. One that cannot be read is itself a bad file."""
    try:
        with faults("cannot be read"):
            _merge(changes, backend.members(shard), f"{shard.id}/", count)
    except FileFault as fault:
        changes.found(shard, VIDEO)
        changes.seen(shard.id, FileFault(f"the shard {fault.reason}"))
        changes.write()
        return
    query = "SELECT 1 FROM source WHERE place = :place AND ref = :ref"
    if changes.ledger.rows(query, {"place": changes.place, "ref": shard.id}):
        changes.gone(shard.id)  # it could not be read before
    changes.write()
    with changes.ledger.transaction() as db:
        values = (changes.place, shard.id, shard.size, shard.version)
        db.execute("INSERT OR REPLACE INTO shard VALUES (?, ?, ?, ?)", values)


def _forget_shard(changes: Changes, shard: str) -> None:
    _merge(changes, iter(()), f"{shard}/", None)
    # It may stand there as a bad file of its own.
    changes.gone(shard)
    changes.write()
    with changes.ledger.transaction() as db:
        db.execute("DELETE FROM shard WHERE place = ? AND ref = ?", (changes.place, shard))


def _merge_captions(changes: Changes, dataset: DatasetPlan) -> None:
    """Captions that the backend or a file of captions tells, as they are now."""
    origin = origin_of(dataset)
    query = """SELECT name, words FROM dataset_caption WHERE place = :place AND origin = :origin AND name > :after
        ORDER BY name LIMIT :limit"""
    known = changes.ledger.pages(query, {"place": changes.place, "origin": origin})
    row, last = next(known, None), ""
    for name, words in caption_rows(dataset):
        if name <= last:
            raise changes.unsorted(last, name)
        last = name
        if not is_utf8(name):
            continue  # such a file is skipped for its name
        while row is not None and row[0] < name:
            changes.caption(origin, row[0], None)
            row = next(known, None)
        text = caption_text(words)
        if row is None or row[0] != name or row[1] != text:
            changes.caption(origin, name, text)
        if row is not None and row[0] == name:
            row = next(known, None)
    while row is not None:
        changes.caption(origin, row[0], None)
        row = next(known, None)


def caption_text(words: Words | FileFault) -> str:
    """Words, or the reason why there are none, as JSON."""
    return words_text(words) if isinstance(words, Words) else json.dumps(words.reason, ensure_ascii=False)


def _look(changes: Changes, dataset: DatasetPlan, workers: Workers, count: Callable[[], None] | None) -> None:
    """Open what was not read yet: clips, and the caption files beside them of the sort that the dataset takes."""
    for kind in CLIPS if dataset.table.images or dataset.masks is not None else (VIDEO,):
        for job, outcome in workers.probed(_jobs(changes, dataset, kind)):
            changes.seen(job.ref.id, outcome)
            if count is not None:
                count()
    if dataset.captions in captions.BESIDE.values():
        for ref in _pending(changes, dataset.captions, _BESIDE_A_CLIP):
            changes.seen(ref.id, _read(dataset.backend, ref))
            if count is not None:
                count()


def _jobs(changes: Changes, dataset: DatasetPlan, kind: str) -> Iterator[ProbeJob]:
    for ref in _pending(changes, kind):
        if ref.size == 0:
            changes.seen(ref.id, _of_nothing(dataset.backend, ref))
        else:
            yield ProbeJob(dataset.backend, ref, dataset.table.decode_timeout)


def _of_nothing(backend: DataBackend, ref: SourceRef) -> FileFault:
    """Why a file of no bytes has none: it may be a link to nothing, or one that may not be read."""
    try:
        with faults("cannot be opened"), backend.open(ref):
            return FileFault("is empty (0 bytes)")
    except FileFault as fault:
        return FileFault(fault.reason)


def _pending(changes: Changes, kind: str, beside: str = "") -> Iterator[SourceRef]:
    rows = changes.ledger.pages(_PENDING.format(beside=beside), {"place": changes.place, "kind": kind})
    return (SourceRef(*row) for row in rows)


def _read(backend: DataBackend, ref: SourceRef) -> Words | FileFault:
    """A caption file."""
    try:
        with faults("its caption file cannot be read"), backend.open(ref) as stream:
            return captions.read(ref.id, stream)
    except FileFault as fault:
        return fault
