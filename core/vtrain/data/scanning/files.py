"""Source files one by one, as the ledger has them after a scan: for people who ask what became of a file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vtrain.contract import Caption, ClipShape, Problem, SourceRef
from vtrain.data.decoding.probe import Probe
from vtrain.data.sample import Sample
from vtrain.data.scanning.captions import BESIDE, stem
from vtrain.data.scanning.database import database_faults, open_readonly
from vtrain.data.scanning.extras import key_doubt
from vtrain.data.scanning.ledger import Ledger, escaped, pages, probe_of
from vtrain.data.scanning.scan import Samples, ScannedDataset, decided, ledger_messages
from vtrain.data.scanning.surveys import (
    DISTINCT,
    caption_doubt,
    caption_looks,
    caption_notes,
    sidecar_keys,
    unmatched_captions,
)
from vtrain.plan.records import DatasetPlan, Plan

STATUSES = ("used", "dropped", "failed")

_COLUMNS = """SELECT file_decision.ref, file_decision.size, file_decision.version, status, file_decision.kind, reason,
    frames, height, width, samples, windows, stretch, cropped, captions, probe, sha256 FROM file_decision
    LEFT JOIN source ON source.place = :place AND source.ref = file_decision.ref
    WHERE decision = :decision"""

_ROWS = f"""{_COLUMNS} AND file_decision.ref > :after AND status IN (SELECT value FROM json_each(:statuses))
    ORDER BY file_decision.ref LIMIT :limit"""

_NAMED = f"{_COLUMNS} AND file_decision.ref IN (SELECT value FROM json_each(:refs)) ORDER BY file_decision.ref"

_COUNTS = """SELECT status, kind, count(*), count(DISTINCT reason), reason, min(ref) FROM file_decision
    WHERE decision = :decision GROUP BY status, kind ORDER BY count(*) DESC, kind"""

_REASONS = """SELECT status, kind, count(*), 1, reason, min(ref) FROM file_decision
    WHERE decision = :decision AND kind = :kind AND status = :status GROUP BY reason ORDER BY count(*) DESC, reason"""

_WIDTHS = """SELECT max(length(width || 'x' || height || '@' || frames)), max(length(ref)) FROM file_decision
    WHERE decision = :decision"""

_PROBE = "SELECT probe FROM source WHERE place = :place AND ref = :ref"

_BESIDE = "SELECT kind FROM source WHERE place = :place AND ref IN (SELECT value FROM json_each(:refs))"

# "/" is the character after ".": a range of names, which the index finds, as LIKE would not.
_OF_STEM = (
    "SELECT ref FROM file_decision WHERE decision = :decision AND ref >= :stem || '.' AND ref < :stem || '/' LIMIT 3"
)

_BELOW = "SELECT ref FROM file_decision WHERE decision = :decision AND substr(ref, -length(:tail)) = :tail LIMIT 3"

_AROUND = """SELECT ref FROM (SELECT ref FROM file_decision WHERE decision = :decision AND ref >= :name
    ORDER BY ref LIMIT :limit) UNION SELECT ref FROM (SELECT ref FROM file_decision WHERE decision = :decision AND ref < :name
    ORDER BY ref DESC LIMIT :limit)"""

_SHARING = """SELECT ref FROM file_decision WHERE decision = :decision AND (instr(lower(ref), :a) OR instr(lower(ref), :b) OR
    instr(lower(ref), :c)) ORDER BY (instr(lower(ref), :a) > 0) + (instr(lower(ref), :b) > 0) + (instr(lower(ref), :c) > 0)
    DESC, abs(length(ref) - :length) LIMIT :limit"""

_CANDIDATES = 2000
"""Names that a wrong one is compared with, which takes time: so many before and after it in order, and so many of the
dataset that have most of its thirds in common with it, since two slips leave one third as it is."""

_ESCAPE = re.compile(r"\\(?:[nrt\\]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A source file, and what became of it under the settings of one dataset.

    dataset: its id; number: its place in plan.datasets. status: one of STATUSES. kind, reason: why it is skipped, or "".
    shape: its bucket. samples, windows: that it gives. stretch: how much wider or higher its picture becomes, at least 1.
    cropped: the share of it that is cropped away.
    captions: of each sample; none for a file that is skipped. probe: None if it could not be opened or is no clip.
    content: SHA-256 of its bytes, "" until they were read.
    """

    dataset: str
    number: int
    ref: SourceRef
    status: str
    kind: str
    reason: str
    shape: ClipShape | None
    samples: int
    windows: int
    stretch: float
    cropped: float
    captions: tuple[Caption, ...]
    probe: Probe | None
    content: str

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.ref.id}"


@dataclass(frozen=True)
class Count:
    """Files of one dataset that are alike. reasons: how many different ones; reason, example: one, and a file of it."""

    status: str
    kind: str
    files: int
    reasons: int
    reason: str
    example: str


@dataclass(frozen=True)
class Files:
    """Every file of some datasets. ledger: its file. problems: of datasets that could not be scanned. messages: about the
    ledger itself. Read from the ledger as it is asked for, never all in memory; every method raises DataError."""

    ledger: Path
    datasets: Mapping[str, tuple[DatasetPlan, ScannedDataset]]
    problems: tuple[Problem, ...]
    messages: tuple[str, ...]

    def rows(self, dataset: str, statuses: Sequence[str] = STATUSES) -> Iterator[SourceFile]:
        """Of one dataset, in order of ref id."""
        found = self.datasets[dataset][1]
        values = {**_of(found), "statuses": json.dumps(list(statuses))}
        with database_faults(self.ledger):
            connection = open_readonly(self.ledger)
        with closing(connection) as db:
            for row in pages(db, self.ledger, _ROWS, values):
                yield _file(found, row)

    def counts(self, dataset: str) -> list[Count]:
        """By status and kind of reason, the most first; by reason where there are few of a kind."""
        found, values = [], _of(self.datasets[dataset][1])
        for row in self._all(_COUNTS, values):
            of_kind = Count(*row)
            if 1 < of_kind.reasons <= DISTINCT:
                rows = self._all(_REASONS, {**values, "status": of_kind.status, "kind": of_kind.kind})
                found += [Count(*row) for row in rows]
            else:
                found.append(of_kind)
        return found

    def notes(self, dataset: str) -> tuple[str, ...]:
        """What else is worth knowing: captions without a clip, and what looks as if it were no caption."""
        plan, found = self.datasets[dataset]
        doubts = (caption_doubt(*each) for each in caption_looks(self._all, found.decision, plan))
        keys = key_doubt(sidecar_keys(self._all, found.place, plan), plan)
        return (*caption_notes(unmatched_captions(self._all, found.place, plan)), *doubts, *filter(None, (keys,)))

    def widths(self, dataset: str) -> tuple[int, int]:
        """Letters of the longest bucket and of the longest ref id."""
        ((bucket, ref),) = self._all(_WIDTHS, _of(self.datasets[dataset][1]))
        return bucket or 0, ref or 0

    def named(self, name: str) -> list[SourceFile]:
        """Those that `name` means: as "<dataset>/<ref id>", else as ref id, else as a path or a URL."""
        for names in (_own_names, _ref_ids, _paths):
            found = []
            for dataset, place in self.datasets.values():
                if refs := names(name, dataset):
                    rows = self._all(_NAMED, {**_of(place), "refs": json.dumps(refs)})
                    found += [_file(place, row) for row in rows]
            if found:
                return found
        return []

    def like(self, name: str) -> list[str]:
        """Files that `name` may have meant, the likeliest first: those that it is the caption file of, those of that name in a
        folder or shard, and those that are called almost so."""
        found: list[str] = []
        for dataset, place in self.datasets.values():
            refs = [ref for names in (_own_names, _ref_ids, _paths) for ref in names(name, dataset)]
            kinds = {kind for (kind,) in self._all(_BESIDE, {**_of(place), "refs": json.dumps(refs)})}
            if kinds & set(BESIDE.values()):
                for ref in refs:
                    found += [f"{dataset.id}/{of}" for (of,) in self._all(_OF_STEM, {**_of(place), "stem": stem(ref)})]
            for ref in refs:
                found += [f"{dataset.id}/{of}" for (of,) in self._all(_BELOW, {**_of(place), "tail": f"/{ref}"})]
                near = get_close_matches(ref, self._candidates(ref, place), n=3, cutoff=0.7)
                found += [f"{dataset.id}/{like}" for like in near]
        return list(dict.fromkeys(found))[:3]

    def _candidates(self, ref: str, place: ScannedDataset) -> set[str]:
        """Names of a dataset that may be like a wrong one."""
        third = -(-len(ref) // 3)
        a, b, c = (ref.lower()[at : at + third] or ref.lower() for at in (0, third, 2 * third))
        values = {**_of(place), "limit": _CANDIDATES}
        around = self._all(_AROUND, {**values, "name": ref})
        sharing = self._all(_SHARING, {**values, "a": a, "b": b, "c": c, "length": len(ref)})
        return {name for (name,) in (*around, *sharing)}

    def samples(self, file: SourceFile) -> tuple[Sample, ...]:
        """What training takes from a file."""
        if file.status != "used":
            return ()
        return Samples(self.ledger, (self.datasets[file.dataset][1],)).of(file.ref.id)

    def probe(self, dataset: str, ref: str) -> Probe | None:
        """What is known of any file of a dataset's place, a mask's too."""
        rows = self._all(_PROBE, {**_of(self.datasets[dataset][1]), "ref": ref})
        return probe_of(rows[0][0]) if rows else None

    def _all(self, query: str, values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        with database_faults(self.ledger), closing(open_readonly(self.ledger)) as db:
            return db.execute(query, values).fetchall()


def look(plan: Plan, dataset: str | None = None, on_file: Callable[[int], None] | None = None) -> Files:
    """Scan, and give what was found, also where a run would stop. dataset: only that one. on_file: called with the number of
    files done. Raises DataError if the ledger cannot be used."""
    problems: list[Problem] = []
    with Ledger(plan.config.cache.dir) as ledger:
        places = list(decided(ledger, plan, problems, on_file, dataset))
        messages = ledger_messages(ledger)
    found = {place.id: (plan.datasets[place.number], place) for place in places}
    return Files(ledger.path, found, tuple(problems), messages)


def _of(found: ScannedDataset) -> dict[str, object]:
    return {"place": found.place, "decision": found.decision}


def _file(found: ScannedDataset, row: Sequence[Any]) -> SourceFile:
    ref, size, version, status, kind, reason, *shape = row[:9]
    samples, windows, stretch, cropped, captions, probe, content = row[9:]
    return SourceFile(
        dataset=found.id, number=found.number, ref=SourceRef(ref, size, version), status=status, kind=kind, reason=reason,
        shape=ClipShape(*shape) if status == "used" else None, samples=samples, windows=windows, stretch=stretch,
        cropped=cropped, captions=tuple(Caption(text, extras) for text, extras in json.loads(captions or "[]")),
        probe=probe_of(probe), content=content or "",
    )  # fmt: skip


def _own_names(name: str, dataset: DatasetPlan) -> list[str]:
    """Ref ids that "<dataset>/<ref id>" may stand for."""
    return _ref_ids(name.removeprefix(f"{dataset.id}/"), dataset) if name.startswith(f"{dataset.id}/") else []


def _ref_ids(name: str, dataset: DatasetPlan) -> list[str]:
    """A name as it is, and as one that was copied from where it was shown stands for."""
    return list(dict.fromkeys((escaped(name), unescaped(name))))


def _paths(name: str, dataset: DatasetPlan) -> list[str]:
    """Ref ids that a path, from the working folder or with links followed, or a URL may stand for."""
    location = dataset.backend.location
    places = dict.fromkeys((location, os.path.realpath(location)))
    paths = dict.fromkeys((name, os.path.abspath(name), os.path.realpath(name)))  # noqa: PTH100 (Path would drop "..")
    refs = [path.removeprefix(f"{place}/") for place in places for path in paths if path.startswith(f"{place}/")]
    return [ref for each in dict.fromkeys(refs) for ref in _ref_ids(each, dataset)]


def unescaped(name: str) -> str:
    r"""A name that was shown with "\n" for its line break and the like, as it is."""
    return _ESCAPE.sub(lambda match: match[0].encode().decode("unicode_escape"), name)
