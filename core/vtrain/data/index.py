"""The index: what training reads of each sample, frozen when the caches are filled. Imports no torch.

All processes train from one index, whatever becomes of the files or of the ledger later. It is a few numpy arrays:
about 140 bytes for a sample of one window and one caption, and pickled as fast as copied.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vtrain.contract import ClipShape, Size
from vtrain.data.sample import Box, Sample

Ints = np.ndarray[Any, np.dtype[np.int32]]
"""Items and positions: there are fewer than 2**31 of them in an epoch."""

Keys = Callable[[Sample], Sequence[str]]
"""A sample's keys of cache entries."""

_KEY = 32
"""Bytes of a key: a SHA-256."""

CONTENTS = ("file", "cut", "captions", "mask")
"""What `Index.contents` marks of a sample: its file's bytes, what is taken of them, its captions, what its mask gives."""


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
class ShapeCount:
    """What a dataset has of one shape."""

    samples: int = 0
    files: int = 0
    windows: int = 0


@dataclass(frozen=True, eq=False)
class Index:
    """The samples that can be trained on, numbered in the order of the scan.

    shapes: the buckets, sorted, none empty. datasets, buckets: of each sample, the number of its dataset in the plan and
    of its bucket in shapes. names: ids, UTF-8. video, text: keys of the entries of its windows and of its captions, a
    caption's of all text encoders one after the other.
    tallies: (number of a dataset, shape) -> what there is. masks: keys of the windows' masks, none for a sample without;
    None if no dataset has any. features: regularizer -> keys of the windows' features. sources: what is needed to decode
    the windows again, as JSON; None unless that is asked for. A draw's choice of a window goes for all of them.
    contents: (samples, CONTENTS) checksums of what they are made of, whatever encodes it; enough to see that one changed.
    """

    shapes: tuple[ClipShape, ...]
    datasets: Ints
    buckets: Ints
    names: Rows
    video: Rows
    text: Rows
    tallies: Mapping[tuple[int, ClipShape], ShapeCount]
    masks: Rows | None = None
    features: Mapping[str, Rows] = field(default_factory=dict)
    sources: Rows | None = None
    contents: np.ndarray[Any, np.dtype[np.uint32]] = field(default_factory=lambda: np.zeros((0, 4), np.uint32))

    def __len__(self) -> int:
        return len(self.names)

    def id(self, number: int) -> str:
        return self.names[number].decode()

    def source(self, number: int) -> Sample:
        """The sample again, as far as decoding it needs. Only of an index with sources."""
        assert self.sources is not None
        place, dataset, ref, size, version, picture, box, fps, starts, content = json.loads(self.sources[number])
        return Sample(
            id=self.id(number), dataset=dataset, place=place, ref_id=ref, size=size, version=version,
            picture=Size(*picture), box=Box(*box), shape=self.shapes[self.buckets[number]], fps=fps,
            starts=tuple(starts), crop="", captions=(), content=content,
        )  # fmt: skip

    def mark(self) -> str:
        """How many samples, and a hash of their ids and shapes, on which the order of training depends."""
        digest = hashlib.sha256()
        ends = [f"\0{shape}\n".encode() for shape in self.shapes]
        for number in range(len(self)):
            digest.update(self.names[number] + ends[self.buckets[number]])
        return f"{len(self)} sample{'s' if len(self) != 1 else ''}, {digest.hexdigest()[:16]}"

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
    video_keys: Keys,
    text_keys: Keys,
    mask_keys: Keys | None = None,
    feature_keys: Mapping[str, Keys] | None = None,
    *,
    sources: bool = False,
) -> Index:
    """The index of samples all of whose entries are in the caches. sources: whether windows can be decoded again."""
    names, sources_of = _Growing(), _Growing()
    video, text, masks = _KeyRows(video_keys), _KeyRows(text_keys), _KeyRows(mask_keys or (lambda sample: ()))
    features = {name: _KeyRows(keys) for name, keys in (feature_keys or {}).items()}
    columns = [video, text, *([masks] if mask_keys else []), *features.values()]
    datasets, buckets, contents = array("i"), array("i"), array("I")
    shapes: dict[ClipShape, int] = {}
    tallies: dict[tuple[int, ClipShape], ShapeCount] = {}
    before: tuple[int, str] | None = None
    for sample in samples:
        tally = tallies.setdefault((sample.place, sample.shape), ShapeCount())
        tally.samples += 1
        tally.windows += len(sample.starts)
        tally.files += before != (sample.place, sample.ref_id)
        before = (sample.place, sample.ref_id)
        names.append(sample.id.encode())
        for column in columns:
            column.append(sample)
        contents.extend(_contents(sample, mask_keys))
        if sources:
            sources_of.append(_source(sample))
        datasets.append(sample.place)
        buckets.append(shapes.setdefault(sample.shape, len(shapes)))
    # Numbered by shape and not by whose clip came first: the order's circles derive their seeds from the number.
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
        masks.rows() if mask_keys else None,
        {name: column.rows() for name, column in features.items()},
        sources_of.rows() if sources else None,
        np.array(contents, dtype=np.uint32).reshape(-1, len(CONTENTS)),
    )


def _contents(sample: Sample, mask_keys: Keys | None) -> Iterator[int]:
    """The CRC-32 of each of CONTENTS."""
    cut = (*sample.shape, sample.fps, sample.starts, *sample.box)
    captions = [(caption.text, sorted(caption.extras.items())) for caption in sample.captions]
    # No encoder goes into a mask's keys.
    for part in (sample.content, cut, captions, mask_keys(sample) if mask_keys else ()):
        yield zlib.crc32(repr(part).encode())


def _source(sample: Sample) -> bytes:
    """What `Index.source` reads."""
    window = [sample.picture, sample.box, sample.fps, sample.starts, sample.content]
    source = [sample.place, sample.dataset, sample.ref_id, sample.size, sample.version, *window]
    return json.dumps(source, separators=(",", ":")).encode()


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


class _KeyRows:
    """Rows of keys while they are made."""

    def __init__(self, keys: Keys) -> None:
        self._keys, self._rows = keys, _Growing()

    def append(self, sample: Sample) -> None:
        self._rows.append(b"".join(map(bytes.fromhex, self._keys(sample))))

    def rows(self) -> Rows:
        return self._rows.rows()
