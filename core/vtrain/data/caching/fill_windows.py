"""Encoding clips' windows that are not in the cache yet: other processes decode ahead while a model encodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from vtrain.contract import ClipShape, DataError, Filling, Problem
from vtrain.data.caching.columns import Column, FeatureColumn, Layout, MaskColumn, Window, known_key, layout_of
from vtrain.data.caching.encoders import Encode, opened
from vtrain.data.caching.fill_text import AGAIN_S
from vtrain.data.caching.sharing import Claims, Peers, digest64, is_share, together_telling
from vtrain.data.caching.stores import Stores
from vtrain.data.decoding.masks import emptiness
from vtrain.data.decoding.once import Copies
from vtrain.data.decoding.video import FileFault
from vtrain.data.decoding.worker import Decoded, DecodeJob, MaskJob, Workers, available_cpus
from vtrain.data.sample import Left, Sample
from vtrain.data.scanning.decisions import settings_key
from vtrain.data.scanning.ledger import Ledger

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


@dataclass
class Unusable:
    """files: "<dataset>/<ref id>" -> why that file is left out. windows: of other files, id of the sample -> start -> why."""

    files: dict[str, str] = field(default_factory=dict)
    windows: dict[str, dict[float, str]] = field(default_factory=dict)

    def __or__(self, other: Unusable) -> Unusable:
        return Unusable(self.files | other.files, self.windows | other.windows)

    def usable(self, sample: Sample) -> tuple[float, ...]:
        """The starts of a sample's windows that can be used."""
        if sample.file in self.files:
            return ()
        out = self.windows.get(sample.id)
        return tuple(start for start in sample.starts if start not in out) if out else sample.starts

    def told(self) -> dict[str, str]:
        """Everything by name, with why."""
        windows = {
            f"{name}, the window at {start:g} s": why
            for name, starts in self.windows.items()
            for start, why in starts.items()
        }
        return dict(sorted((self.files | windows).items()))


_MOST_DECODERS = 4


def fill_windows(
    stores: Stores, samples: Iterable[Sample], peers: Peers, device: str
) -> Generator[Filling, None, Unusable]:
    """Make what is missing, column after column, each process its share; a model is opened only if something is missing.

    samples: may be gone through more than once. Returns what cannot be used, found by any process. Raises DataError for a
    full disk, and for a bad file where data.on_bad_file is "stop", on all processes.
    """
    unusable = Unusable()
    for column in stores.columns:
        work = _ColumnFilling(stores, column, unusable, peers, device)
        for found in (yield from together_telling(peers, work.run(samples))):
            unusable |= found
    return unusable


class _ColumnFilling:
    """One process's work on one column: the windows of the files that fall to it.

    out: what earlier columns found that cannot be used. dented: files of which this one found windows that cannot.
    unusable, made: windows that cannot be made, and that were.
    """

    def __init__(self, stores: Stores, column: Column, out: Unusable, peers: Peers, device: str) -> None:
        self.stores, self.column, self.out = stores, column, out
        self.peers, self.device = peers, device
        self.decoders = min(_MOST_DECODERS, max(1, available_cpus() // peers.count - 1))
        self.found, self.dented = Unusable(), set[str]()
        self.unusable, self.made = 0, 0

    def run(self, samples: Iterable[Sample]) -> Generator[Filling, None, Unusable]:
        """Make what is missing."""
        count, lacking, unread, missing = 0, 0, 0, set[int]()
        for window in self._windows(samples):
            count += 1
            layout = self._layout(window)
            if layout is None:
                lacking += 1
                unread += not self.column.content(window[0])
                missing.add(digest64(self._claim(window)))
            else:
                self._look(window, layout)
        yield Filling(self.column.stage, count - lacking, count, unread=unread)
        if missing:
            todo = (window for window in self._windows(samples) if digest64(self._claim(window)) in missing)
            yield from self._fill(by_shape(todo, self.stores.plan.config.cache.video_batch), count - lacking, count)
        if self.found.windows:
            self._whole_files(samples)
        return self.found

    def _fill(self, windows: Iterable[Window], done: int, total: int) -> Iterator[Filling]:
        """done: windows that are there."""
        config = self.stores.plan.config.cache
        limit = max(dataset.table.decode_timeout for dataset in self.stores.plan.datasets)
        with (
            Ledger(config.dir) as ledger,
            Claims(config.dir) as claims,
            Copies(2 * self.decoders) as copies,
            Workers(self.decoders, limit) as workers,
            ExitStack() as stack,
        ):
            encoder = _Encoder(lambda: stack.enter_context(opened(self.column, self.device)))
            while done + self.unusable < total:
                # What another run has claimed is looked at again later: by then it is there, or that run has ended.
                busy: list[Window] = []
                before = done + self.unusable
                jobs = self._jobs(windows, claims, copies, busy)
                with closing(workers.made(jobs, self.decoders + config.video_batch)) as decoded:
                    for batch in in_batches(decoded, config.video_batch):
                        bad = self.unusable
                        self._encode(encoder, ledger, batch)
                        for job, _ in batch:
                            claims.drop(self._claim((job.sample, job.start)))
                        done += len(batch) - (self.unusable - bad)
                        yield self._standing(done, total)
                if total - len(busy) > done + self.unusable:  # the rest was there when it was looked at
                    done = total - len(busy) - self.unusable
                    yield self._standing(done, total)
                elif done + self.unusable == before:
                    time.sleep(AGAIN_S)
                windows = busy

    def _standing(self, done: int, total: int) -> Filling:
        return Filling(self.column.stage, done, total, unusable=self.unusable, made=self.made)

    def _windows(self, samples: Iterable[Sample]) -> Iterator[Window]:
        """This process's share. All windows of a file fall to one process."""
        for sample in samples:
            if self.column.covers(sample) and is_share(self.peers, f"{sample.place}\0{sample.ref_id}"):
                yield from ((sample, start) for start in self.out.usable(sample))

    def _layout(self, window: Window) -> Layout | None:
        key = known_key(self.column, *window)
        return None if key is None else layout_of(self.column, window[0], key)

    def _claim(self, window: Window) -> str:
        """What a window is claimed by: its file is not read yet, so it has no key."""
        sample, start = window
        return self.column.key(sample, start, f"{self.stores.location(sample)}\0{self.column.ref(sample)}")

    def _jobs(self, windows: Iterable[Window], claims: Claims, copies: Copies, busy: list[Window]) -> Iterator[Job]:
        """What is still to be made and not being made elsewhere. busy: takes what another run is making.

        A remote file of several windows, which follow each other, is fetched once.
        """
        for window in windows:
            sample, start = window
            if not claims.take(self._claim(window)):
                busy.append(window)
                continue
            layout = self._layout(window)
            if layout is not None:
                claims.drop(self._claim(window))
                self._look(window, layout)
                continue
            dataset = self.stores.plan.datasets[sample.place]
            several = len(sample.starts) > 1 or sample.id != sample.file
            backend = copies.of(dataset.backend) if several else dataset.backend
            limit, wanted = dataset.table.decode_timeout, self._wanted(window)
            if isinstance(self.column, MaskColumn):
                yield MaskJob(backend, sample, start, self.column.grid(sample.shape), limit, wanted)
            else:
                frames = self.column.geometry(sample.shape)[1] if isinstance(self.column, FeatureColumn) else None
                yield DecodeJob(backend, sample, start, limit, wanted, frames, bool(dataset.decoder))

    def _wanted(self, window: Window) -> Callable[[str], bool]:
        """Whether the window of a file with these bytes is not there yet: it may be under another name."""
        sample, start = window
        return lambda content: layout_of(self.column, sample, self.column.key(sample, start, content)) is None

    def _encode(self, encoder: _Encoder, ledger: Ledger, batch: Sequence[tuple[Job, Decoded]]) -> None:
        """Write down what reading the files showed; encode what is to be encoded, and write its entries."""
        for job, decoded in batch:
            if decoded.content is not None:
                ledger.record_hash(self.stores.location(job.sample), self.column.ref(job.sample), decoded.content)
                if decoded.pixels is None and decoded.fault is None:  # it is there under these bytes
                    key = self.column.key(job.sample, job.start, decoded.content)
                    self._look((job.sample, job.start), self.column.entries.layout(key) or {})
            if decoded.fault is not None:
                self._leave_out(ledger, job.sample, decoded.fault)
        clips = [(job, d.pixels, d.content) for job, d in batch if d.pixels is not None and d.content is not None]
        if not clips:
            return
        made = encoder.open()([pixels for _, pixels, _ in clips], clips[0][0].sample)
        for (job, _, content), parts in zip(clips, made, strict=True):
            if not all(bool(part.isfinite().all()) for part in parts.values()):
                reason = f"encodes to {self._noun()} that are not finite"
                self._leave_out(ledger, job.sample, FileFault(reason, lasting=False))
                continue
            key = self.column.key(job.sample, job.start, content)
            self.column.entries.write(key, parts)
            self.made += 1
            self._look((job.sample, job.start), parts)

    def _noun(self) -> str:
        return f"features ({self.column.name})" if isinstance(self.column, FeatureColumn) else "numbers"

    def _look(self, window: Window, parts: Iterable[str]) -> None:
        """Note a window of which nothing would be trained. parts: names of its entry's tensors."""
        sample, start = window
        if isinstance(self.column, MaskColumn) and self.column.is_empty(sample, parts):
            why = emptiness(sample.mask_ref, invert=self.column.inverts(sample))
            self.found.windows.setdefault(sample.id, {})[start] = why
            self.dented.add(sample.file)

    def _whole_files(self, samples: Iterable[Sample]) -> None:
        """Files of which no window is left are left out for good: until they, their masks or the settings change."""
        files: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample.file in self.dented:
                files.setdefault(sample.file, []).append(sample)
        with Ledger(self.stores.plan.config.cache.dir) as ledger:
            for file, own in files.items():
                if file not in self.found.files and not any(map(self.found.usable, own)):
                    (why, *_) = self.found.windows[own[0].id].values()
                    ledger.record_left(self._settings(own[0]), own[0], Left("dropped", "empty mask", why))
                    self.found.files[file] = why
                    for sample in own:
                        del self.found.windows[sample.id]

    def _settings(self, sample: Sample) -> str:
        return settings_key(self.stores.plan.datasets[sample.place], self.stores.plan.family)

    def _leave_out(self, ledger: Ledger, sample: Sample, fault: FileFault) -> None:
        """Remember why a file cannot be used, and count the window. Raises DataError where the configuration says stop."""
        dataset = self.stores.plan.datasets[sample.place]
        self.found.files[sample.file] = fault.reason
        self.unusable += 1
        if fault.lasting:
            kind = "bad mask" if isinstance(self.column, MaskColumn) else "decoding"
            ledger.record_left(self._settings(sample), sample, Left("failed", kind, fault.reason))
        if dataset.table.on_bad_file == "stop":
            place = f"{dataset.backend.location}/{sample.ref_id}"
            remedy = 'Mend or remove the file, or set data.on_bad_file = "skip".'
            raise DataError(Problem(place, f"{fault.reason}.", remedy))


class _Encoder:
    """The column's model, opened when it is first needed."""

    def __init__(self, opening: Callable[[], Encode]) -> None:
        self._opening, self._encode = opening, list[Encode]()

    def open(self) -> Encode:
        if not self._encode:
            self._encode.append(self._opening())
        return self._encode[0]
