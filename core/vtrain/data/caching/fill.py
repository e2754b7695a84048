"""Filling: captions and clips' windows that are not in the cache yet are encoded.

Other processes decode ahead while a model encodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import groupby

import torch

from vtrain.contract import (
    Caption,
    DataError,
    Filling,
    Problem,
    Role,
    TextEncoder,
)
from vtrain.data.caching.artifacts import (
    Artifact,
    ClipArtifact,
    ConditionArtifact,
    FeatureArtifact,
    Layout,
    MaskArtifact,
    Window,
    known_key,
    layout_of,
)
from vtrain.data.caching.encoders import DecodingJob, EncodeWindows, by_shape, in_batches, opened
from vtrain.data.caching.inventory import Stores, texts
from vtrain.data.caching.sharing import Leases, Peers, digest64, is_share, together_telling
from vtrain.data.caching.text import tensors_of
from vtrain.data.decoding.masks import emptiness
from vtrain.data.decoding.spool import Copies
from vtrain.data.decoding.video import FileFault
from vtrain.data.decoding.worker import Decoded, DecodeJob, MaskJob, Workers, available_cpus
from vtrain.data.sample import Sample, Skipped
from vtrain.data.scanning.decisions import settings_key
from vtrain.data.scanning.ledger import Ledger
from vtrain.plan.text import stage_names
from vtrain.registry.spelling import check_part

AGAIN_S = 0.5
"""Seconds until one looks again for what another run is making."""

Texts = Iterable[tuple[Caption, Role]]


def fill_text(
    stores: Stores, samples: Iterable[Sample], extra: Sequence[tuple[Caption, Role]], peers: Peers, device: str
) -> Generator[Filling, None, None]:
    """Encode what is missing, encoder after encoder, each process its share; one is opened only if something of it is.

    samples: may be gone through more than once. Raises DataError for a full disk, on all processes, and PluginError for text
    that is not what its encoder promises.
    """
    for name in stores.encoders:
        work = _TextFilling(stores, name, peers, device)
        yield from together_telling(peers, work.run(texts(stores.plan, samples, extra)))


class _TextFilling:
    """One process's work on one text encoder: the captions that fall to it."""

    def __init__(self, stores: Stores, name: str, peers: Peers, device: str) -> None:
        self.stores, self.name, self.peers, self.device = stores, name, peers, device
        self.spec, self.stage = stores.encoders[name], stage_names(stores.encoders)[name]

    def run(self, texts: Texts) -> Generator[Filling, None, None]:
        missing: dict[str, tuple[Caption, Role]] = {}
        present: set[int] = set()  # digests: of those that are there only the number is wanted
        for caption, role in texts:
            key = self.stores.text_key(self.name, caption, role)
            if is_share(self.peers, key) and key not in missing and digest64(key) not in present:
                if self.stores.text.sound(key):
                    present.add(digest64(key))
                else:
                    missing[key] = (caption, role)
        yield Filling(self.stage, len(present), len(present) + len(missing))
        if missing:
            batches = list(_batches(missing, self.stores.plan.config.cache.text_batch))
            yield from self._fill(missing, batches, len(present))

    def _fill(
        self, missing: Mapping[str, tuple[Caption, Role]], batches: list[list[str]], done: int
    ) -> Generator[Filling, None, None]:
        """Encode the missing captions, batch by batch. done: captions that are there."""
        total, made = done + len(missing), 0
        with Leases(self.stores.plan.config.cache.dir) as leases, ExitStack() as stack:
            encoder: TextEncoder | None = None
            while batches:
                left: list[list[str]] = []
                for batch in batches:
                    # What another run has claimed is scanned again later: by then it is there, or that run has ended.
                    free = [key for key in batch if leases.take(key)]
                    # Looked at again under the lease: another run may have written it since.
                    keys = [key for key in free if not self.stores.text.sound(key)]
                    if keys:
                        if encoder is None:
                            encoder = stack.enter_context(self.spec.open(self.device))
                            check_part("text encoder", encoder)
                        self._encode(encoder, missing, keys)
                        made += len(keys)
                    for key in free:
                        leases.drop(key)
                    if free:
                        done += len(free)
                        yield Filling(self.stage, done, total, made=made)
                    if len(free) < len(batch):
                        left.append([key for key in batch if key not in free])
                if left == batches:
                    time.sleep(AGAIN_S)
                batches = left

    def _encode(self, encoder: TextEncoder, missing: Mapping[str, tuple[Caption, Role]], keys: list[str]) -> None:
        """Encode captions of one role and write their entries."""
        with torch.no_grad():
            text = encoder.encode([missing[key][0] for key in keys], missing[keys[0]][1])
        for key, tensors in zip(keys, tensors_of(self.name, self.spec, text, len(keys)), strict=True):
            self.stores.text.write(key, tensors)


def _batches(missing: Mapping[str, tuple[Caption, Role]], size: int) -> Iterator[list[str]]:
    """Keys of one role, captions of like length together, so that little is spent on padding."""
    order = sorted(missing, key=lambda key: (missing[key][1], len(missing[key][0].text), key))
    for _, group in groupby(order, key=lambda key: missing[key][1]):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


@dataclass
class Unusable:
    """files: "<dataset>/<ref id>" -> why that file is skipped. windows: of other files, id of the sample -> start -> why."""

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

    def reasons(self) -> dict[str, str]:
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
    """Make what is missing, artifact after artifact, each process its share; a model is opened only if something is missing.

    samples: may be gone through more than once. Returns what cannot be used, found by any process. Raises DataError for a
    full disk, and for a bad file where data.on_bad_file is "stop", on all processes.
    """
    unusable = Unusable()
    for artifact in stores.artifacts:
        work = _ArtifactFilling(stores, artifact, unusable, peers, device)
        for found in (yield from together_telling(peers, work.run(samples))):
            unusable |= found
    return unusable


class _ArtifactFilling:
    """One process's work on one artifact: the windows of the files that fall to it.

    out: what earlier artifacts found that cannot be used. damaged: files of which this one found windows that cannot.
    unusable, made: windows that cannot be made, and that were.
    """

    def __init__(self, stores: Stores, artifact: Artifact, out: Unusable, peers: Peers, device: str) -> None:
        self.stores, self.artifact, self.out = stores, artifact, out
        self.peers, self.device = peers, device
        self.decoders = min(_MOST_DECODERS, max(1, available_cpus() // peers.count - 1))
        self.found, self.damaged = Unusable(), set[str]()
        self.unusable, self.made = 0, 0

    def run(self, samples: Iterable[Sample]) -> Generator[Filling, None, Unusable]:
        """Make what is missing."""
        count, lacking, unread, missing = 0, 0, 0, set[int]()
        for window in self._windows(samples):
            count += 1
            layout = self._layout(window)
            if layout is None:
                lacking += 1
                unread += not self.artifact.content(window[0])
                missing.add(digest64(self._lease_name(window)))
            else:
                self._look(window, layout)
        yield Filling(self.artifact.stage, count - lacking, count, unread=unread)
        if missing:
            # Read from the ledger once more: of what is missing only digests were kept.
            todo = (window for window in self._windows(samples) if digest64(self._lease_name(window)) in missing)
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
            Leases(config.dir) as leases,
            Copies(2 * self.decoders) as copies,
            Workers(self.decoders, limit) as workers,
            ExitStack() as stack,
        ):
            encoder = _LazyEncoder(lambda: stack.enter_context(opened(self.artifact, self.device)))
            while done + self.unusable < total:
                # What another run has claimed is scanned again later: by then it is there, or that run has ended.
                busy: list[Window] = []
                before = done + self.unusable
                jobs = self._jobs(windows, leases, copies, busy)
                with closing(workers.made(jobs, self.decoders + config.video_batch)) as decoded:
                    for batch in in_batches(decoded, config.video_batch):
                        bad = self.unusable
                        self._encode(encoder, ledger, batch)
                        for job, _ in batch:
                            leases.drop(self._lease_name((job.sample, job.start)))
                        done += len(batch) - (self.unusable - bad)
                        yield self._standing(done, total)
                if total - len(busy) > done + self.unusable:  # the rest was there when it was looked at
                    done = total - len(busy) - self.unusable
                    yield self._standing(done, total)
                elif done + self.unusable == before:
                    time.sleep(AGAIN_S)
                windows = busy

    def _standing(self, done: int, total: int) -> Filling:
        return Filling(self.artifact.stage, done, total, unusable=self.unusable, made=self.made)

    def _windows(self, samples: Iterable[Sample]) -> Iterator[Window]:
        """This process's share. All windows of a file fall to one process."""
        for sample in samples:
            if self.artifact.covers(sample) and is_share(self.peers, f"{sample.place}\0{sample.ref_id}"):
                yield from ((sample, start) for start in self.out.usable(sample))

    def _layout(self, window: Window) -> Layout | None:
        key = known_key(self.artifact, *window)
        return None if key is None else layout_of(self.artifact, window[0], key)

    def _lease_name(self, window: Window) -> str:
        """What a window is claimed by: its file is not read yet, so it has no key."""
        sample, start = window
        return self.artifact.key(sample, start, f"{self.stores.location(sample)}\0{self.artifact.ref(sample)}")

    def _jobs(
        self, windows: Iterable[Window], leases: Leases, copies: Copies, busy: list[Window]
    ) -> Iterator[DecodingJob]:
        """What is still to be made and not being made elsewhere. busy: takes what another run is making.

        A remote file of several windows, which follow each other, is fetched once.
        """
        for window in windows:
            sample, start = window
            if not leases.take(self._lease_name(window)):
                busy.append(window)
                continue
            # Looked at again under the lease: another run may have made it since.
            layout = self._layout(window)
            if layout is not None:
                leases.drop(self._lease_name(window))
                self._look(window, layout)
                continue
            dataset = self.stores.plan.datasets[sample.place]
            several = len(sample.starts) > 1 or sample.id != sample.file
            backend = copies.of(dataset.backend) if several else dataset.backend
            limit, wanted = dataset.table.decode_timeout, self._wanted(window)
            if isinstance(self.artifact, MaskArtifact):
                yield MaskJob(backend, sample, start, self.artifact.grid(sample.shape), limit, wanted)
            else:
                assert isinstance(self.artifact, ClipArtifact)
                frames = self.artifact.frames(sample)
                yield DecodeJob(backend, sample, start, limit, wanted, frames, bool(dataset.decoder))

    def _wanted(self, window: Window) -> Callable[[str], bool]:
        """Whether the window of a file with these bytes is not there yet: it may be under another name."""
        sample, start = window
        return lambda content: layout_of(self.artifact, sample, self.artifact.key(sample, start, content)) is None

    def _encode(self, encoder: _LazyEncoder, ledger: Ledger, batch: Sequence[tuple[DecodingJob, Decoded]]) -> None:
        """Write down what reading the files showed; encode what is to be encoded, and write its entries."""
        for job, decoded in batch:
            if decoded.content is not None:
                ledger.record_hash(self.stores.location(job.sample), self.artifact.ref(job.sample), decoded.content)
                if decoded.pixels is None and decoded.fault is None:  # it is there under these bytes
                    key = self.artifact.key(job.sample, job.start, decoded.content)
                    self._look((job.sample, job.start), self.artifact.entries.layout(key) or {})
            if decoded.fault is not None:
                self._leave_out(ledger, job.sample, decoded.fault)
        clips = [(job, d.pixels, d.content) for job, d in batch if d.pixels is not None and d.content is not None]
        if not clips:
            return
        made = encoder.open()([pixels for _, pixels, _ in clips], clips[0][0].sample)
        for (job, _, content), parts in zip(clips, made, strict=True):
            if not all(bool(part.isfinite().all()) for part in parts.values()):
                reason = f"encodes to {self._noun()} that are not finite"
                # For this run alone: the file itself may be fine.
                self._leave_out(ledger, job.sample, FileFault(reason, lasting=False))
                continue
            key = self.artifact.key(job.sample, job.start, content)
            self.artifact.entries.write(key, parts)
            self.made += 1
            self._look((job.sample, job.start), parts)

    def _noun(self) -> str:
        if isinstance(self.artifact, ConditionArtifact):
            return f"numbers of the {self.artifact.stage}"
        return self.artifact.stage if isinstance(self.artifact, FeatureArtifact) else "numbers"

    def _look(self, window: Window, parts: Iterable[str]) -> None:
        """Note a window of which nothing would be trained. parts: names of its entry's tensors."""
        sample, start = window
        if isinstance(self.artifact, MaskArtifact) and self.artifact.is_empty(sample, parts):
            why = emptiness(sample.mask_ref, invert=self.artifact.inverts(sample))
            self.found.windows.setdefault(sample.id, {})[start] = why
            self.damaged.add(sample.file)

    def _whole_files(self, samples: Iterable[Sample]) -> None:
        """Files of which no window is left are skipped for good: until they, their masks or the settings change."""
        files: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample.file in self.damaged:
                files.setdefault(sample.file, []).append(sample)
        with Ledger(self.stores.plan.config.cache.dir) as ledger:
            for file, own in files.items():
                if file not in self.found.files and not any(map(self.found.usable, own)):
                    (why, *_) = self.found.windows[own[0].id].values()
                    ledger.record_skipped(self._settings(own[0]), own[0], Skipped("dropped", "empty mask", why))
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
        # What may pass is not written down: the next run tries again.
        if fault.lasting:
            kind = "bad mask" if isinstance(self.artifact, MaskArtifact) else "decoding"
            ledger.record_skipped(self._settings(sample), sample, Skipped("failed", kind, fault.reason))
        if dataset.table.on_bad_file == "stop":
            place = f"{dataset.backend.location}/{sample.ref_id}"
            remedy = 'Fix or remove the file, or set data.on_bad_file = "skip".'
            raise DataError(Problem(place, f"{fault.reason}.", remedy))


class _LazyEncoder:
    """The artifact's model, opened when it is first needed."""

    def __init__(self, opening: Callable[[], EncodeWindows]) -> None:
        self._opening, self._encode = opening, list[EncodeWindows]()

    def open(self) -> EncodeWindows:
        if not self._encode:
            self._encode.append(self._opening())
        return self._encode[0]
