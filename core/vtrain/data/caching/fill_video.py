"""Encoding the clips that are not in the cache yet: other processes decode ahead while the codec encodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing

import torch
from torch import Tensor

from vtrain.contract import ClipShape, DataError, PluginError, Problem, VideoCodec
from vtrain.data.caching.claims import Claims
from vtrain.data.caching.fill_text import AGAIN_S, Report
from vtrain.data.caching.peers import Peers, digest64, is_share, together
from vtrain.data.caching.stores import Stores
from vtrain.data.decoding.decode import unit_range
from vtrain.data.decoding.once import Copies
from vtrain.data.decoding.video import FileFault
from vtrain.data.decoding.worker import Decoded, DecodeJob, Workers, available_cpus
from vtrain.data.sample import Sample
from vtrain.data.scanning.fates import settings_key
from vtrain.data.scanning.ledger import Ledger

_MOST_DECODERS = 4

Window = tuple[Sample, float]
"""A sample and one of its starts."""


def fill_video(stores: Stores, samples: Iterable[Sample], peers: Peers, device: str, report: Report) -> dict[str, str]:
    """Encode what is missing, each process its share; the codec is opened only if something is.

    samples: may be gone through more than once. Returns "<dataset>/<ref id>" -> why that file is left out, of all processes. Raises
    DataError for a full disk, and for a bad file where data.on_bad_file is "stop", on all processes.
    """
    filling = _Filling(stores, peers, device, report)
    left_out: dict[str, str] = {}
    for found in together(peers, lambda: filling.run(samples)):
        left_out |= found
    return dict(sorted(left_out.items()))


def _by_shape(windows: Iterable[Window], size: int) -> Iterator[Window]:
    """The same windows in runs of `size` of one shape, and at the end what is left of each; no decoded one is held."""
    waiting: dict[ClipShape, list[Window]] = {}
    for window in windows:
        batch = waiting.setdefault(window[0].shape, [])
        batch.append(window)
        if len(batch) == size:
            yield from waiting.pop(window[0].shape)
    for batch in waiting.values():
        yield from batch


class _Filling:
    """One process's work: the windows of the files that fall to it."""

    def __init__(self, stores: Stores, peers: Peers, device: str, report: Report) -> None:
        self.stores, self.peers, self.device, self.report = stores, peers, device, report
        self.decoders = min(_MOST_DECODERS, max(1, available_cpus() // peers.count - 1))
        self.left_out: dict[str, str] = {}

    def run(self, samples: Iterable[Sample]) -> dict[str, str]:
        """Encode what is missing. Returns "<dataset>/<ref id>" -> why that file is left out."""
        count, lacking, missing = 0, 0, set[int]()
        for window in self._windows(samples):
            count += 1
            if not self._present(window):
                lacking += 1
                missing.add(digest64(self._claim(window)))
        self.report("video", count - lacking, count)
        if missing:
            todo = (window for window in self._windows(samples) if digest64(self._claim(window)) in missing)
            self._fill(_by_shape(todo, self.stores.plan.config.cache.video_batch), count - lacking, count)
        return self.left_out

    def _fill(self, windows: Iterable[Window], done: int, total: int) -> None:
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
            codec = _Codec(lambda: stack.enter_context(self.stores.plan.family.open_video_codec(self.device)))
            while done < total:
                # What another run has claimed is looked at again later: by then it is there, or that run has ended.
                busy: list[Window] = []
                before = done
                jobs = self._jobs(windows, claims, copies, busy)
                with closing(workers.decoded(jobs, self.decoders + config.video_batch)) as decoded:
                    for batch in _in_batches(decoded, config.video_batch):
                        self._encode(codec, ledger, batch)
                        for job, _ in batch:
                            claims.drop(self._claim((job.sample, job.start)))
                        done += len(batch)
                        self.report("video", done, total)
                if total - len(busy) > done:  # the rest was there when it was looked at
                    done = total - len(busy)
                    self.report("video", done, total)
                elif done == before:
                    time.sleep(AGAIN_S)
                windows = busy

    def _windows(self, samples: Iterable[Sample]) -> Iterator[Window]:
        """This process's share. All windows of a file fall to one process."""
        for sample in samples:
            if is_share(self.peers, f"{sample.place}\0{sample.ref_id}"):
                yield from ((sample, start) for start in sample.starts)

    def _present(self, window: Window) -> bool:
        key = self.stores.known_video_key(*window)
        return key is not None and self.stores.video.sound(key)

    def _claim(self, window: Window) -> str:
        """What a window is claimed by: its file is not read yet, so it has no key."""
        sample, start = window
        return self.stores.video_key(sample, start, f"{self.stores.location(sample)}\0{sample.ref}")

    def _jobs(
        self, windows: Iterable[Window], claims: Claims, copies: Copies, busy: list[Window]
    ) -> Iterator[DecodeJob]:
        """What is still to be made and not being made elsewhere. busy: takes what another run is making.

        A remote file of several windows, which follow each other, is fetched once.
        """
        for window in windows:
            sample, start = window
            if not claims.take(self._claim(window)):
                busy.append(window)
            elif self._present(window):
                claims.drop(self._claim(window))
            else:
                dataset = self.stores.plan.datasets[sample.place]
                limit = dataset.table.decode_timeout
                several = len(sample.starts) > 1 or sample.id != sample.file
                backend = copies.of(dataset.backend) if several else dataset.backend
                yield DecodeJob(backend, sample, start, limit, self._wanted(window))

    def _wanted(self, window: Window) -> Callable[[str], bool]:
        """Whether the window of a file with these bytes is not there yet: it may be under another name."""
        return lambda content: not self.stores.video.sound(self.stores.video_key(*window, content))

    def _encode(self, codec: _Codec, ledger: Ledger, batch: Sequence[tuple[DecodeJob, Decoded]]) -> None:
        """Write down what reading the files showed; encode what is to be encoded, and write its entries."""
        for job, decoded in batch:
            if decoded.content is not None:
                ledger.record_hash(self.stores.location(job.sample), job.sample.ref, decoded.content)
            if decoded.fault is not None:
                self._leave_out(ledger, job.sample, decoded.fault)
        clips = [(job, decoded) for job, decoded in batch if decoded.pixels is not None]
        if not clips:
            return
        parts = self._latents(
            codec, [decoded.pixels for _, decoded in clips if decoded.pixels is not None], clips[0][0]
        )
        for number, (job, decoded) in enumerate(clips):
            own = {name: part[number] for name, part in parts.items()}
            if not all(bool(part.isfinite().all()) for part in own.values()):
                self._leave_out(ledger, job.sample, FileFault("encodes to numbers that are not finite", lasting=False))
            elif decoded.content is not None:
                self.stores.video.write(self.stores.video_key(job.sample, job.start, decoded.content), own)

    def _latents(self, codec: _Codec, pixels: list[Tensor], job: DecodeJob) -> dict[str, Tensor]:
        """The tensors of the entries of clips of one shape, by name, on the CPU. Raises PluginError for other shapes."""
        with torch.no_grad():
            sampled = self.stores.plan.config.cache.latents == "sample"
            latents = codec.open().encode(unit_range(torch.stack(pixels).to(self.device)), std=sampled)
        parts = {"mean": latents.mean} | ({} if latents.std is None or not sampled else {"std": latents.std})
        expected = (len(pixels), *self.stores.plan.family.latent_shape(job.sample.shape))
        fault = "This is a fault of the model family's plugin."
        if sampled and "std" not in parts:
            raise PluginError(Problem("", 'the video codec gave no std, which cache.latents = "sample" needs.', fault))
        for part in parts.values():
            if part.shape != expected:
                what = f"the video codec made latents of {tuple(part.shape)} where {expected} were promised."
                raise PluginError(Problem("", what, fault))
        return {name: part.float().cpu() for name, part in parts.items()}

    def _leave_out(self, ledger: Ledger, sample: Sample, fault: FileFault) -> None:
        """Remember why a file cannot be used. Raises DataError where the configuration says stop."""
        dataset = self.stores.plan.datasets[sample.place]
        self.left_out[sample.file] = fault.reason
        if fault.lasting:
            settings = settings_key(dataset, self.stores.plan.family.frame_rule)
            ledger.record_failure(settings, sample, fault.reason)
        if dataset.table.on_bad_file == "stop":
            place = f"{dataset.backend.location}/{sample.ref_id}"
            remedy = 'Mend or remove the file, or set data.on_bad_file = "skip".'
            raise DataError(Problem(place, f"{fault.reason}.", remedy))


class _Codec:
    """The video codec, opened when it is first needed."""

    def __init__(self, opening: Callable[[], VideoCodec]) -> None:
        self._opening, self._codec = opening, list[VideoCodec]()

    def open(self) -> VideoCodec:
        if not self._codec:
            self._codec.append(self._opening())
        return self._codec[0]


def _in_batches(decoded: Iterable[tuple[DecodeJob, Decoded]], size: int) -> Iterator[list[tuple[DecodeJob, Decoded]]]:
    """Decoded windows of one shape, with at most `size` to encode in each list, nothing held back that need not be."""
    batch: list[tuple[DecodeJob, Decoded]] = []
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
