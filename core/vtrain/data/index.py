"""The index: what training reads of each sample, frozen when the caches are filled. Imports no torch.

All processes train from one index, whatever becomes of the files or of the ledger later. It is a few numpy arrays:
about 140 bytes for a sample of one window and one caption, and pickled as fast as copied.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtrain.contract import ClipShape
from vtrain.data.sample import Sample

Ints = np.ndarray[Any, np.dtype[np.int32]]

_KEY = 32
"""Bytes of a key: a SHA-256."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Byte strings, one after the other. ends: int64, where each ends."""

    data: bytes
    ends: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> bytes:
        return self.data[self.ends[number - 1] if number else 0 : self.ends[number]]

    def keys(self, number: int) -> tuple[str, ...]:
        """The row as keys of cache entries."""
        row = self[number]
        return tuple(row[at : at + _KEY].hex() for at in range(0, len(row), _KEY))


@dataclass
class Tally:
    """What a dataset has of one shape."""

    samples: int = 0
    files: int = 0
    windows: int = 0


@dataclass(frozen=True, eq=False)
class Index:
    """The samples that can be trained on, numbered in the order of the scan.

    shapes: the buckets, sorted, none empty. datasets, buckets: of each sample, the number of its dataset in the plan and
    of its bucket in shapes. names: ids, UTF-8. video, text: keys of the entries of its windows and of its captions.
    tallies: (number of a dataset, shape) -> what there is.
    """

    shapes: tuple[ClipShape, ...]
    datasets: Ints
    buckets: Ints
    names: Rows
    video: Rows
    text: Rows
    tallies: Mapping[tuple[int, ClipShape], Tally]

    def __len__(self) -> int:
        return len(self.names)

    def id(self, number: int) -> str:
        return self.names[number].decode()

    def mark(self) -> str:
        """How many samples, and a hash of their ids and shapes, on which the order of training depends."""
        digest = hashlib.sha256()
        ends = [f"\0{shape}\n".encode() for shape in self.shapes]
        for number in range(len(self)):
            digest.update(self.names[number] + ends[self.buckets[number]])
        return f"{len(self)} samples, {digest.hexdigest()[:16]}"

    def copies(self) -> tuple[int, tuple[str, str] | None]:
        """How many samples are made of the same bytes in the same way as one before them, and the ids of one such pair."""
        starts = np.concatenate([np.zeros(1, dtype=np.int64), self.video.ends[:-1]]) if len(self) else self.video.ends
        # The start of a SHA-256 tells as much as 64 bits can.
        first = np.frombuffer(self.video.data, dtype=np.uint64)[starts // 8]
        order = np.argsort(first, kind="stable")
        same = np.flatnonzero(first[order[1:]] == first[order[:-1]])
        if not len(same):
            return 0, None
        at = same[np.argmin(order[same + 1])]
        return len(same), (self.id(int(order[at])), self.id(int(order[at + 1])))


def build(
    samples: Iterable[Sample],
    video_keys: Callable[[Sample], Sequence[str]],
    text_keys: Callable[[Sample], Sequence[str]],
) -> Index:
    """The index of samples all of whose entries are in the caches."""
    names, video, text = _Growing(), _Growing(), _Growing()
    datasets, buckets = array("i"), array("i")
    shapes: dict[ClipShape, int] = {}
    tallies: dict[tuple[int, ClipShape], Tally] = {}
    before: tuple[int, str] | None = None
    for sample in samples:
        tally = tallies.setdefault((sample.place, sample.shape), Tally())
        tally.samples += 1
        tally.windows += len(sample.starts)
        tally.files += before != (sample.place, sample.ref_id)
        before = (sample.place, sample.ref_id)
        names.append(sample.id.encode())
        video.append(b"".join(map(bytes.fromhex, video_keys(sample))))
        text.append(b"".join(map(bytes.fromhex, text_keys(sample))))
        datasets.append(sample.place)
        buckets.append(shapes.setdefault(sample.shape, len(shapes)))
    place = {shape: number for number, shape in enumerate(sorted(shapes))}
    renumbered = np.array([place[shape] for shape in shapes], dtype=np.int32)
    found = np.array(buckets, dtype=np.int32)
    return Index(
        tuple(place),
        np.array(datasets, dtype=np.int32),
        renumbered[found] if len(found) else found,
        names.rows(),
        video.rows(),
        text.rows(),
        tallies,
    )


class _Growing:
    """Rows while they are made."""

    def __init__(self) -> None:
        self._data, self._ends = bytearray(), array("q")

    def append(self, row: bytes) -> None:
        self._data += row
        self._ends.append(len(self._data))

    def rows(self) -> Rows:
        """What was appended; nothing is kept, so that it is in memory twice for one moment and not till all are made."""
        made = Rows(bytes(self._data), np.array(self._ends, dtype=np.int64))
        self._data, self._ends = bytearray(), array("q")
        return made
