"""Windows in the order in which they are decoded, and in the batches in which they are encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vtrain.contract import ClipShape
from vtrain.data.caching.columns import Window
from vtrain.data.decoding.worker import Decoded, DecodeJob, MaskJob

Job = DecodeJob | MaskJob


def by_shape(windows: Iterable[Window], size: int) -> Iterator[Window]:
    """The same windows in runs of `size` of one shape, and at the end what is left of each; no decoded one is held."""
    waiting: dict[ClipShape, list[Window]] = {}
    for window in windows:
        batch = waiting.setdefault(window[0].shape, [])
        batch.append(window)
        if len(batch) == size:
            yield from waiting.pop(window[0].shape)
    for batch in waiting.values():
        yield from batch


def in_batches(decoded: Iterable[tuple[Job, Decoded]], size: int) -> Iterator[list[tuple[Job, Decoded]]]:
    """Decoded windows of one shape, with at most `size` to encode in each list, nothing held back that need not be."""
    batch: list[tuple[Job, Decoded]] = []
    for job, found in decoded:
        if batch and batch[0][0].sample.shape != job.sample.shape:
            yield batch
            batch = []
        batch.append((job, found))
        if sum(other.pixels is not None for _, other in batch) in (0, size):
            yield batch
            batch = []
    if batch:
        yield batch
