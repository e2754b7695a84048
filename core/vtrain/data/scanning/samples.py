"""The samples of a scan: read from the ledger as they are asked for, never all in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtrain.contract import Caption, ClipShape, Size, SourceRef
from vtrain.data.sample import Box, MaskFile, Sample
from vtrain.data.scanning.database import database_faults, open_readonly
from vtrain.data.scanning.ledger import pages, probe_of

_OF = """
    SELECT fate.ref, fate.size, fate.version, frames, height, width, made, captions, source.probe,
        source.sha256, mask.ref, mask.size, mask.version, mask.sha256
    FROM fate JOIN source ON source.place = :place AND source.ref = fate.ref AND source.size = fate.size
        AND source.version = fate.version
    LEFT JOIN source mask ON mask.place = :place AND mask.ref = fate.mask
    WHERE decision = :decision AND {which} AND made IS NOT NULL AND (fate.mask = '' OR mask.ref IS NOT NULL)
    ORDER BY fate.ref LIMIT :limit
"""

_USED, _ONE = _OF.format(which="fate.ref > :after"), _OF.format(which="fate.ref = :ref")


@dataclass(frozen=True)
class Found:
    """What a scan found in one dataset. id: the dataset's; number: its place in plan.datasets; crop: of its table.

    place, decision: numbers in the ledger. count: samples.
    """

    id: str
    number: int
    crop: str
    place: int
    decision: int
    count: int


@dataclass(frozen=True)
class Samples:
    """Every sample of every dataset: those of a dataset together, in order of the files' ids and of the windows.

    ledger: its file. May be iterated any number of times, in any process, while the ledger is written to: a sample bears
    the content hash that the ledger knows by then, and one whose file failed meanwhile still comes.
    """

    ledger: Path
    datasets: tuple[Found, ...]

    def __len__(self) -> int:
        """How many the scan found."""
        return sum(found.count for found in self.datasets)

    def of(self, ref: str) -> tuple[Sample, ...]:
        """Those of one file, in all datasets. Raises DataError."""
        with database_faults(self.ledger), closing(open_readonly(self.ledger)) as db:
            return tuple(
                sample
                for found in self.datasets
                for row in db.execute(_ONE, {"place": found.place, "decision": found.decision, "ref": ref, "limit": 1})
                for sample in _samples(found, row)
            )

    def __iter__(self) -> Iterator[Sample]:
        """Raises DataError."""
        if not self.datasets:
            return
        with database_faults(self.ledger):
            connection = open_readonly(self.ledger)
        with closing(connection) as db:
            for found in sorted(self.datasets, key=lambda found: f"{found.id}/"):
                values = {"place": found.place, "decision": found.decision}
                for row in pages(db, self.ledger, _USED, values):
                    yield from _samples(found, row)


def _samples(found: Found, row: tuple[Any, ...]) -> Iterator[Sample]:
    """The samples of one file."""
    ref, size, version, frames, height, width, made, captions, probe, sha256, *mask = row
    source = probe_of(probe)
    assert source is not None  # a file is used by its probe
    masked = MaskFile(SourceRef(*mask[:3]), mask[3] or "") if mask[0] is not None else None
    fps, cuts = json.loads(made)
    texts = tuple(Caption(text, extras) for text, extras in json.loads(captions))
    for number, (starts, box) in enumerate(cuts, start=1):
        yield Sample(
            id=f"{found.id}/{ref}{f'#{number}' if len(cuts) > 1 else ''}", dataset=found.id, place=found.number,
            ref_id=ref, size=size, version=version, picture=Size(source.width, source.height), box=Box(*box),
            shape=ClipShape(frames, height, width), fps=fps, starts=tuple(starts), crop=found.crop, captions=texts,
            content=sha256 or "", mask=masked,
        )  # fmt: skip
