"""The order of training: a pure function from the number of a micro-batch to the draws in it.

An epoch passes over all items, each sample once and once more per repeat, in a permutation that depends on (seed,
epoch) alone. The draw number of an item is epoch * length + its position. Items are dealt to their bucket's stream,
which runs on from epoch to epoch; whenever a stream has B items more, they are a micro-batch. So no item is ever
dropped or doubled, no batch is partial, and how many batches lie before an epoch is arithmetic: the sum over buckets
of floor(epoch * n / B).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtrain.data.seeds import derive

Ints = np.ndarray[Any, np.dtype[np.int64]]

_EPOCHS_KEPT = 4


@dataclass(frozen=True)
class Draw:
    """One use of one item. number: of the draw; item: which item is drawn."""

    number: int
    item: int


@dataclass(frozen=True)
class _Epoch:
    """One walk. items: by position. streams: per bucket, the positions of its items, ascending.

    ends: position at which a batch is complete, ascending; buckets, lasts: whose batch, and its last place in the
    bucket's whole stream.
    """

    items: Ints
    streams: tuple[Ints, ...]
    ends: Ints
    buckets: Ints
    lasts: Ints


class Order:
    """buckets: the bucket of each item, numbered from 0 with none empty. batch_size: B."""

    def __init__(self, seed: int, buckets: Sequence[int], batch_size: int) -> None:
        if not len(buckets):
            raise ValueError("no items to order")
        self._seed, self._batch = seed, batch_size
        self._bucket_of: Ints = np.asarray(buckets, dtype=np.int64)
        self._sizes: list[int] = np.bincount(self._bucket_of).tolist()
        self._recent: OrderedDict[int, _Epoch] = OrderedDict()

    @property
    def length(self) -> int:
        """Items in an epoch."""
        return len(self._bucket_of)

    def batches_before(self, epoch: int) -> int:
        """Micro-batches complete when `epoch` epochs have passed."""
        return sum(epoch * size // self._batch for size in self._sizes)

    def micro_batches(self, epochs: float) -> int:
        """Micro-batches complete when that many epochs, not always whole, have passed."""
        whole = math.floor(epochs)
        rest = math.floor((epochs - whole) * self.length + 1e-6)
        complete = self.batches_before(whole)
        return complete + (int(np.searchsorted(self._epoch(whole).ends, rest)) if rest else 0)

    def epoch_of(self, micro_batch: int) -> float:
        """Epochs passed when that micro-batch is complete."""
        epoch, place = self._find(micro_batch)
        return epoch + (int(self._epoch(epoch).ends[place]) + 1) / self.length

    def draws(self, micro_batch: int) -> tuple[Draw, ...]:
        """The B draws of a micro-batch, all of one bucket, in order of their numbers."""
        epoch, place = self._find(micro_batch)
        walk = self._epoch(epoch)
        last, bucket = int(walk.lasts[place]), int(walk.buckets[place])
        return tuple(self._draw(bucket, at) for at in range(last - self._batch + 1, last + 1))

    def _draw(self, bucket: int, at: int) -> Draw:
        """The draw at a place of a bucket's stream."""
        epoch, index = divmod(at, self._sizes[bucket])
        walk = self._epoch(epoch)
        position = int(walk.streams[bucket][index])
        return Draw(epoch * self.length + position, int(walk.items[position]))

    def _find(self, micro_batch: int) -> tuple[int, int]:
        """The epoch in which it is complete, and its place among those complete in that epoch."""
        if micro_batch < 0:
            raise IndexError(f"micro-batch {micro_batch}")
        low, high = 0, 1
        while self.batches_before(high) <= micro_batch:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.batches_before(middle) <= micro_batch else (low, middle)
        return low, micro_batch - self.batches_before(low)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._recent:
            self._recent[epoch] = self._walk(epoch)
            while len(self._recent) > _EPOCHS_KEPT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(epoch)
        return self._recent[epoch]

    def _walk(self, epoch: int) -> _Epoch:
        items = permutation(self._seed, epoch, self.length)
        streams = tuple(np.split(np.argsort(self._bucket_of[items], kind="stable"), np.cumsum(self._sizes)[:-1]))
        ends, buckets, lasts = zip(*self._completed(epoch, streams), strict=True)
        order = np.argsort(np.concatenate(ends))
        return _Epoch(items, streams, *(np.concatenate(columns)[order] for columns in (ends, buckets, lasts)))

    def _completed(self, epoch: int, streams: Sequence[Ints]) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Per bucket, of the batches complete in this epoch: where in the epoch, the bucket, where in its stream."""
        for bucket, (stream, size) in enumerate(zip(streams, self._sizes, strict=True)):
            first = epoch * size
            # Batch j of a bucket is complete at stream place (j + 1) * B - 1.
            lasts = np.arange(first // self._batch, (first + size) // self._batch, dtype=np.int64)
            lasts = (lasts + 1) * self._batch - 1
            yield stream[lasts - first], np.full(len(lasts), bucket, dtype=np.int64), lasts


def permutation(seed: int, epoch: int, length: int) -> Ints:
    """Items in the order of an epoch: sorted by the raw output of a Philox counter, which no numpy release changes."""
    keys = np.random.Philox(key=derive(seed, "order", epoch)).random_raw(length)
    return np.argsort(keys, kind="stable").astype(np.int64)
