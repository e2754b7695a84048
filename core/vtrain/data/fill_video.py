"""Encoding the clips that are not in the cache yet: one thread reads and decodes ahead while the codec encodes."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from vtrain.contract import DataError, PluginError, Problem, VideoCodec
from vtrain.data.decode import decode, hashed, unit_range
from vtrain.data.fill_text import Report
from vtrain.data.ledger import Fate, Ledger
from vtrain.data.sample import Sample
from vtrain.data.scan import settings_key
from vtrain.data.stores import Stores
from vtrain.data.video import FileFault, faults

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Prepared:
    """A window of a sample whose file was read. content: SHA-256 of its bytes, if they could be read.

    pixels: uint8 (3, F, h, w), or None if there is nothing to encode: the entry was there already, or `fault`.
    """

    sample: Sample
    start: float
    content: str | None = None
    pixels: Tensor | None = None
    fault: FileFault | None = None


def fill_video(stores: Stores, samples: Sequence[Sample], device: str, report: Report) -> dict[str, str]:
    """Encode what is missing; the codec is opened only if something is. Returns sample id -> why it was left out.

    Raises DataError for a full disk, and for a bad file where data.on_bad_file is "stop".
    """
    left_out: dict[str, str] = {}
    wanted = [(sample, start) for sample in samples for start in sample.starts]
    todo = sorted((w for w in wanted if not _present(stores, *w)), key=lambda w: (w[0].shape, w[0].id, w[0].place))
    done = len(wanted) - len(todo)
    report("video", done, len(wanted))
    if not todo:
        return left_out
    batches = _prepare(stores, todo, stores.plan.config.cache.video_batch)
    with Ledger(stores.plan.config.cache.dir) as ledger, ExitStack() as stack, closing(_ahead(batches)) as ready:
        codec: VideoCodec | None = None
        for batch in ready:
            for item in batch:
                _note(stores, ledger, item, left_out)
            clips = [item for item in batch if item.pixels is not None]
            if clips:
                codec = codec or stack.enter_context(stores.plan.family.open_video_codec(device))
                for item in _encode(stores, codec, clips, device):
                    _note(stores, ledger, item, left_out)
            done += len(batch)
            report("video", done, len(wanted))
    return left_out


def _present(stores: Stores, sample: Sample, start: float) -> bool:
    key = stores.known_video_key(sample, start)
    return key is not None and stores.video.sound(key)


def _prepare(stores: Stores, windows: Sequence[tuple[Sample, float]], size: int) -> Iterator[list[Prepared]]:
    """Windows in lists of one shape, with at most `size` to encode in each."""
    for _, group in groupby(windows, key=lambda window: window[0].shape):
        batch: list[Prepared] = []
        for sample, start in group:
            batch.append(_read(stores, sample, start))
            if sum(item.pixels is not None for item in batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


def _read(stores: Stores, sample: Sample, start: float) -> Prepared:
    """Hash the file and, unless its entry is there under that hash, decode it."""
    content = None
    try:
        with (
            faults("cannot be opened"),
            stores.plan.datasets[sample.place].backend.open(sample.ref) as stream,
            hashed(stream) as (content, copy),
        ):
            if stores.video.sound(stores.video_key(sample, start, content)):
                return Prepared(sample, start, content)
            return Prepared(sample, start, content, decode(copy, sample, start))
    except FileFault as fault:
        return Prepared(sample, start, content, fault=fault)


def _ahead(items: Iterator[ItemT]) -> Generator[ItemT]:
    """The same items, each made in a thread while the one before is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _note(stores: Stores, ledger: Ledger, item: Prepared, left_out: dict[str, str]) -> None:
    """Write down what reading a sample showed. Raises DataError for a fault where the configuration says stop."""
    sample, dataset = item.sample, stores.plan.datasets[item.sample.place]
    if item.content is not None:
        ledger.record_hash(dataset.backend.location, sample, item.content)
    if item.fault is None:
        return
    reason = item.fault.reason
    left_out[sample.id] = reason
    if item.fault.lasting:
        fate = Fate(sample.size, sample.version, "failed", "", "decoding", reason)
        ledger.record_fates(settings_key(dataset, stores.plan.family.frame_rule), {sample.ref_id: fate})
    if dataset.table.on_bad_file == "stop":
        place = f"{dataset.backend.location}/{sample.ref_id}"
        remedy = 'Mend or remove the file, or set data.on_bad_file = "skip".'
        raise DataError(Problem(place, f"{reason}.", remedy))


def _encode(stores: Stores, codec: VideoCodec, clips: Sequence[Prepared], device: str) -> Iterator[Prepared]:
    """Encode clips of one shape and write their entries; yields those whose latents are of no use, with the fault."""
    pixels = torch.stack([item.pixels for item in clips if item.pixels is not None]).to(device)
    with torch.no_grad():
        mean = codec.encode(unit_range(pixels)).mean.float().cpu()
    expected = stores.plan.family.latent_shape(clips[0].sample.shape)
    if mean.shape != (len(clips), *expected):
        what = f"the video codec made latents of {tuple(mean.shape)} where {(len(clips), *expected)} were promised."
        raise PluginError(Problem("", what, "This is a fault of the model family's plugin."))
    for item, latents in zip(clips, mean, strict=True):
        if not bool(latents.isfinite().all()):
            yield Prepared(
                item.sample, item.start, fault=FileFault("encodes to numbers that are not finite", lasting=False)
            )
        elif item.content is not None:
            stores.video.write(stores.video_key(item.sample, item.start, item.content), {"mean": latents})
