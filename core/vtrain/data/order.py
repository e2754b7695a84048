"""The order of training: a pure function from the number of a micro-batch to the draws in it.

An epoch passes over all items, each sample once and once more per repeat, in a permutation that depends on (seed,
epoch) alone. Items of a dataset whose weight is below the largest pass in turn: those of one dataset and bucket stand in
a circle, in a fixed order of its own, and an epoch takes the next `share` of the circle, so that no item comes twice in
an epoch and all come equally often. Draws are numbered through. Items are dealt to their bucket's stream, which runs on
from epoch to epoch; whenever a stream has B items more, they are a micro-batch. So no item is ever dropped or doubled, no
batch is partial, and how many batches lie before an epoch is arithmetic: the sum over buckets of floor(n / B), n being
the items that the epochs before took.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vtrain.data.index import Ints
from vtrain.data.seeds import SEED_BITS, derive

_EPOCHS_KEPT = 2  # a batch may begin in one and end in the next


@dataclass(frozen=True)
class Draw:
    """One use of one item. number: of the draw; item: which item is drawn."""

    number: int
    item: int


@dataclass(frozen=True)
class _Circle:
    """The items of one bucket and one dataset. An epoch takes rate of them; before epoch e, floor(e * rate + phase) were.

    items: in the order in which they are taken; None for those of which every epoch takes all. phase: in [0, 1), so that
    small circles do not all give their item in the same epoch. Both are over a common `divisor`.
    """

    bucket: int
    size: int
    items: Ints | None = None
    rate: int = 0
    phase: int = 0
    divisor: int = 1

    @classmethod
    def thinned(cls, bucket: int, items: Ints, share: Fraction, phase: int) -> _Circle:
        """phase: of 2**SEED_BITS."""
        # In whole numbers, so that the floor is exact in any epoch, however late.
        divisor = share.denominator << SEED_BITS
        rate = (share.numerator * len(items)) << SEED_BITS
        return cls(bucket, len(items), items, rate, phase * share.denominator, divisor)

    def before(self, epoch: int) -> int:
        """How many items the epochs before took."""
        if self.items is None:
            return epoch * self.size
        return (epoch * self.rate + self.phase) // self.divisor

    def taken(self, epoch: int) -> Ints:
        """The items that an epoch takes, none twice."""
        assert self.items is not None
        start, end = self.before(epoch), self.before(epoch + 1)
        return self.items[np.arange(start, end) % self.size]


@dataclass(frozen=True)
class _Epoch:
    """One walk. items: by position. streams: per bucket, the positions of its items, ascending.

    ends: position at which a batch is complete, ascending; buckets, lasts: whose batch, and its last place among what
    the epoch adds to its bucket's stream.
    """

    items: Ints
    streams: tuple[Ints, ...]
    ends: Ints
    buckets: Ints
    lasts: Ints


class Order:
    """buckets: the bucket of each item, numbered from 0 with none empty. batch_size: B.

    datasets: the dataset of each item; shares: of each dataset, which part of its items an epoch takes, in (0, 1]. Without
    them, all.
    """

    def __init__(
        self,
        seed: int,
        buckets: Sequence[int] | Ints,
        batch_size: int,
        datasets: Sequence[int] | Ints | None = None,
        shares: Sequence[Fraction] = (),
    ) -> None:
        if not len(buckets):
            raise ValueError("no items to order")
        self._seed, self._batch = seed, batch_size
        self._bucket_of: Ints = np.asarray(buckets, dtype=np.int32)
        self._buckets = int(self._bucket_of.max()) + 1
        self._always: Ints | None = None
        self._circles = self._all() if datasets is None else self._thinned(np.asarray(datasets, np.int32), shares)
        self._recent: OrderedDict[int, _Epoch] = OrderedDict()

    def _all(self) -> tuple[_Circle, ...]:
        return tuple(_Circle(bucket, size) for bucket, size in enumerate(np.bincount(self._bucket_of).tolist()) if size)

    def _thinned(self, datasets: Ints, shares: Sequence[Fraction]) -> tuple[_Circle, ...]:
        whole = np.array([share == 1 for share in shares])[datasets]
        if whole.all():
            return self._all()
        self._always = np.flatnonzero(whole).astype(np.int32)
        sizes = np.bincount(self._bucket_of[whole], minlength=self._buckets).tolist()
        circles = [_Circle(bucket, size) for bucket, size in enumerate(sizes) if size]
        for dataset, share in enumerate(shares):
            for bucket in range(self._buckets if share != 1 else 0):
                items = np.flatnonzero((datasets == dataset) & (self._bucket_of == bucket)).astype(np.int32)
                if len(items):
                    order = shuffled(derive(self._seed, "circle", dataset, bucket), len(items))
                    phase = derive(self._seed, "phase", dataset, bucket)
                    circles.append(_Circle.thinned(bucket, items[order], share, phase))
        return tuple(circles)

    def length(self, epoch: int) -> int:
        """Items in an epoch. Where a dataset is thinned out, epochs differ by a few."""
        return self.draws_before(epoch + 1) - self.draws_before(epoch)

    def draws_before(self, epoch: int) -> int:
        """Draws in all epochs before one: the number of its first draw."""
        return sum(circle.before(epoch) for circle in self._circles)

    def batches_before(self, epoch: int) -> int:
        """Micro-batches complete when `epoch` epochs have passed."""
        return sum(items // self._batch for items in self._before(epoch))

    def _before(self, epoch: int) -> list[int]:
        """Per bucket, the items in all epochs before one."""
        counts = [0] * self._buckets
        for circle in self._circles:
            counts[circle.bucket] += circle.before(epoch)
        return counts

    def micro_batches(self, epochs: float) -> int:
        """Micro-batches complete when that many epochs, not always whole, have passed."""
        whole = math.floor(epochs)
        # 1e-6: (2.3 - 2) * 10 is 2.9999999999999982 in floats.
        rest = math.floor((epochs - whole) * self.length(whole) + 1e-6)
        complete = self.batches_before(whole)
        return complete + (int(np.searchsorted(self._epoch(whole).ends, rest)) if rest else 0)

    def epoch_of(self, micro_batch: int) -> float:
        """Epochs passed when that micro-batch is complete."""
        epoch, place = self._find(micro_batch)
        return epoch + (int(self._epoch(epoch).ends[place]) + 1) / self.length(epoch)

    def draws(self, micro_batch: int) -> tuple[Draw, ...]:
        """The B draws of a micro-batch, all of one bucket, in order of their numbers."""
        epoch, place = self._find(micro_batch)
        walk = self._epoch(epoch)
        bucket, last = int(walk.buckets[place]), int(walk.lasts[place])
        found: list[Draw] = []
        while True:
            first = max(0, last - (self._batch - len(found)) + 1)
            found[:0] = [self._draw(epoch, bucket, at) for at in range(first, last + 1)]
            if len(found) == self._batch:
                return tuple(found)
            # The rest came in the epochs before: the next one back that took anything of this bucket.
            epoch = self._last_that_took(bucket, epoch)
            last = len(self._epoch(epoch).streams[bucket]) - 1

    def _draw(self, epoch: int, bucket: int, at: int) -> Draw:
        """The draw at a place of what an epoch adds to a bucket's stream."""
        walk = self._epoch(epoch)
        position = int(walk.streams[bucket][at])
        return Draw(self.draws_before(epoch) + position, int(walk.items[position]))

    def _last_that_took(self, bucket: int, epoch: int) -> int:
        """The last epoch before `epoch` in which the bucket's stream grew."""
        total = self._before(epoch)[bucket]
        low, high = 0, epoch  # fewer before low, as many before high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle)[bucket] < total else (low, middle)
        return low

    def _find(self, micro_batch: int) -> tuple[int, int]:
        """The epoch in which it is complete, and its place among those complete in that epoch."""
        if micro_batch < 0:
            raise IndexError(f"micro-batch {micro_batch}")
        for epoch, walk in reversed(self._recent.items()):  # nearly always that of the batch before
            before = self.batches_before(epoch)
            if before <= micro_batch < before + len(walk.ends):
                return epoch, micro_batch - before
        # Doubled, then halved: a resume far into a run finds its epoch without walking there.
        low, high = 0, 1
        while self.batches_before(high) <= micro_batch:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.batches_before(middle) <= micro_batch else (low, middle)
        return low, micro_batch - self.batches_before(low)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._recent:
            while len(self._recent) >= _EPOCHS_KEPT:
                self._recent.popitem(last=False)
            self._recent[epoch] = self._walk(epoch)
        self._recent.move_to_end(epoch)
        return self._recent[epoch]

    def _walk(self, epoch: int) -> _Epoch:
        items = self._taken(epoch)
        buckets = self._bucket_of[items]
        order = np.argsort(buckets, kind="stable").astype(np.int32)  # stable: positions stay ascending in each bucket
        sizes = np.bincount(buckets, minlength=self._buckets)
        del buckets
        streams = tuple(np.split(order, np.cumsum(sizes)[:-1]))
        ends, of, lasts = zip(*self._completed(epoch, streams), strict=True)
        place = np.argsort(np.concatenate(ends))
        return _Epoch(items, streams, *(np.concatenate(columns)[place] for columns in (ends, of, lasts)))

    def _taken(self, epoch: int) -> Ints:
        """The items of an epoch by position."""
        order = permutation(self._seed, epoch, self.length(epoch))
        if self._always is None:
            return order
        circles = [circle.taken(epoch) for circle in self._circles if circle.items is not None]
        taken: Ints = np.sort(np.concatenate([self._always, *circles]))[order]
        return taken

    def _completed(self, epoch: int, streams: Sequence[Ints]) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Per bucket, of the batches complete in this epoch: where in the epoch, the bucket, where in its own stream."""
        for bucket, (stream, before) in enumerate(zip(streams, self._before(epoch), strict=True)):
            # Of the first batch that is complete here, before % B items came before.
            lasts = np.arange(self._batch - 1 - before % self._batch, len(stream), self._batch, dtype=np.int32)
            yield stream[lasts], np.full(len(lasts), bucket, dtype=np.int32), lasts


def permutation(seed: int, epoch: int, length: int) -> Ints:
    """Items in the order of an epoch."""
    return shuffled(derive(seed, "order", epoch), length)


def shuffled(seed: int, length: int) -> Ints:
    """range(length), sorted by the raw output of a Philox counter, which no numpy release changes."""
    keys = np.random.Philox(key=seed).random_raw(length)
    return np.argsort(keys, kind="stable").astype(np.int32)  # stable: equal keys have one order, too
