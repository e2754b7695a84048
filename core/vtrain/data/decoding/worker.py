"""Probing and decoding of untrusted files, in processes of their own with a limit on time and memory.

A decoder that crashes, hangs or eats memory takes its process with it, and the file is named with that reason; the next
file gets a new process. Files and storages are opened here: a process gets a local file's descriptor, or asks for the
bytes of another, and holds no credentials. Pixels come back in shared memory. A process ends when this one does, also
when this one is killed; Ctrl-C does not reach it.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from vtrain.contract import DataBackend, SourceRef
from vtrain.data.decoding.probe import Probe
from vtrain.data.decoding.video import FileFault, faults
from vtrain.data.sample import MaskGrid, Sample
from vtrain.registry.blame import in_background

if TYPE_CHECKING:
    from multiprocessing.pool import AsyncResult, ThreadPool

    from torch import Tensor

    from vtrain.data.decoding.process import Answer, DecodingProcess, PixelsWanted

MEMORY = 4 << 30
"""Bytes of memory (RLIMIT_DATA: all but code and shared pixels) that one process may take."""

JobT = TypeVar("JobT", bound="ProbeJob | DecodeJob | MaskJob")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class ProbeJob:
    """A file to probe. limit_s: seconds for it, instead of the workers' own."""

    backend: DataBackend
    ref: SourceRef
    limit_s: float | None = None


@dataclass(frozen=True)
class DecodeJob:
    """A window to decode. wanted: asked, in a thread, with the SHA-256 of the file's bytes, whether to decode it.

    frames: numbers of those that are wanted, ascending; None: all. torchcodec: whether that decodes it, if it is given the
    file.
    """

    backend: DataBackend
    sample: Sample
    start: float
    limit_s: float | None = None
    wanted: PixelsWanted | None = None
    frames: tuple[int, ...] | None = None
    torchcodec: bool = False

    @property
    def ref(self) -> SourceRef:
        """The clip's file."""
        return self.sample.ref


@dataclass(frozen=True)
class MaskJob:
    """The mask of a window to average; the sample has one. wanted: asked with the SHA-256 of the mask's file."""

    backend: DataBackend
    sample: Sample
    start: float
    grid: MaskGrid
    limit_s: float | None = None
    wanted: PixelsWanted | None = None

    @property
    def ref(self) -> SourceRef:
        """The mask's file."""
        assert self.sample.mask is not None
        return self.sample.mask.ref


@dataclass(frozen=True)
class Decoded:
    """content: SHA-256 of the file's bytes, None if they could not be read.

    pixels: uint8 (3, F, h, w), or of a mask fp32 (f, h, w) in [0, 1], not inverted;
    None if they were not wanted, or if there is a `fault`. unfit: why a file that was for torchcodec was decoded by PyAV.
    """

    content: str | None = None
    pixels: Tensor | None = None
    fault: FileFault | None = None
    unfit: str = ""


class Workers(AbstractContextManager["Workers"]):
    """`count` processes, each started when it is first needed and replaced when it dies.

    limit_s: seconds that a process may spend on one file, not counting its waiting for the storage; memory: bytes that
    it may take. Backends are opened in `count` threads.
    """

    def __init__(self, count: int, limit_s: float, memory: int = MEMORY) -> None:
        self._count, self._limit_s, self._memory = count, limit_s, memory
        self._threads = max(1, available_cpus() // count)
        self._pool: ThreadPool | None = None
        self._lock = Lock()
        self._idle: list[DecodingProcess] = []
        self._all: set[DecodingProcess] = set()
        self._closed = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the processes, whatever they do; a thread that waits for a storage is left to it."""
        with self._lock:
            self._closed = True
            processes = list(self._all)
        # The threads that wait for them see their channels end.
        for process in processes:
            process.kill()
        if self._pool is not None:
            self._pool.terminate()
        with self._lock:
            # Those that a thread put back meanwhile are closed already.
            left, self._all = self._all, set()
        for process in left:
            process.close()

    def probe(self, backend: DataBackend, ref: SourceRef) -> Probe:
        """Raises FileFault."""
        found = self._submit(self._probe, ProbeJob(backend, ref)).get()
        if isinstance(found, FileFault):
            raise found
        return found

    def decode(self, backend: DataBackend, sample: Sample, start: float) -> tuple[str, Tensor]:
        """(SHA-256 of the file's bytes, uint8 (3, F, h, w)). Raises FileFault."""
        done = self.done(DecodeJob(backend, sample, start))
        if done.fault is not None or done.content is None or done.pixels is None:
            raise done.fault or FileFault("was not decoded", lasting=False)
        return done.content, done.pixels

    def done(self, job: DecodeJob) -> Decoded:
        return self._submit(self._decode, job).get()

    def probed(
        self, jobs: Iterable[ProbeJob], ahead: int | None = None
    ) -> Generator[tuple[ProbeJob, Probe | FileFault]]:
        """Each job with its outcome, in order; at most `ahead` of them are begun before they are asked for."""
        return self._in_order(self._probe, jobs, ahead)

    def decoded(self, jobs: Iterable[DecodeJob], ahead: int | None = None) -> Generator[tuple[DecodeJob, Decoded]]:
        """Each job with its outcome, in order. ahead: windows that are decoded, or being so, before they are asked for.

        That many windows are in memory, and one more.
        """
        return self._in_order(self._decode, jobs, ahead)

    def masked(self, jobs: Iterable[MaskJob], ahead: int | None = None) -> Generator[tuple[MaskJob, Decoded]]:
        """As `decoded`, of masks. Faults name the mask's file."""
        return self._in_order(self._mask, jobs, ahead)

    def mask(self, backend: DataBackend, sample: Sample, start: float, grid: MaskGrid) -> tuple[str, Tensor]:
        """(SHA-256 of the mask's file, fp32 (f, h, w), not inverted). Raises FileFault, which names the file."""
        done = self._submit(self._mask, MaskJob(backend, sample, start, grid)).get()
        if done.fault is not None or done.content is None or done.pixels is None:
            raise done.fault or FileFault("its mask was not decoded", lasting=False)
        return done.content, done.pixels

    def made(
        self, jobs: Iterable[DecodeJob | MaskJob], ahead: int | None = None
    ) -> Generator[tuple[DecodeJob | MaskJob, Decoded]]:
        """As `decoded`, of windows and masks as they come."""
        return self._in_order(
            lambda job: self._mask(job) if isinstance(job, MaskJob) else self._decode(job), jobs, ahead
        )

    def _in_order(
        self, work: Callable[[JobT], ResultT], jobs: Iterable[JobT], ahead: int | None
    ) -> Generator[tuple[JobT, ResultT]]:
        coming: deque[tuple[JobT, AsyncResult[ResultT]]] = deque()
        for job in jobs:
            coming.append((job, self._submit(work, job)))
            if len(coming) > (2 * self._count if ahead is None else ahead):
                done, result = coming.popleft()
                yield done, result.get()
        while coming:
            done, result = coming.popleft()
            yield done, result.get()

    def _submit(self, work: Callable[[JobT], ResultT], job: JobT) -> AsyncResult[ResultT]:
        """Threads are started at the first job. Python does not wait for them when it exits: a storage may not answer."""
        if self._pool is None:
            from multiprocessing.pool import ThreadPool

            self._pool = ThreadPool(self._count)
        return self._pool.apply_async(_named, (work, job))

    def _probe(self, job: ProbeJob) -> Probe | FileFault:
        try:
            with faults("cannot be opened"), job.backend.open(job.ref) as stream:
                answer = self._run(stream, None, 0.0, job.limit_s, lambda _: True)
        except FileFault as fault:
            return fault
        return Probe(*answer.probe)

    def _decode(self, job: DecodeJob) -> Decoded:
        sample = job.sample if job.frames is None else job.sample.only(job.frames)
        return self._pixels(job, sample, job.sample.ref, None)

    def _mask(self, job: MaskJob) -> Decoded:
        done = self._pixels(job, job.sample, job.ref, job.grid)
        if done.fault is None:
            return done
        reason = f"its mask {job.ref.id}: {done.fault.reason}"
        return Decoded(done.content, fault=FileFault(reason, lasting=done.fault.lasting))

    def _pixels(self, job: DecodeJob | MaskJob, sample: Sample, ref: SourceRef, mask: MaskGrid | None) -> Decoded:
        """sample: the job's, with the frames that are wanted."""
        content: list[str] = []

        def wanted(found: str) -> bool:
            content.append(found)
            return job.wanted is None or job.wanted(found)

        try:
            with faults("cannot be opened"), job.backend.open(ref) as stream:
                torchcodec = isinstance(job, DecodeJob) and job.torchcodec
                answer = self._run(stream, sample, job.start, job.limit_s, wanted, mask, torchcodec)
        except FileFault as fault:
            return Decoded(content[0] if content else None, fault=fault)
        return Decoded(content[0] if content else None, answer.pixels, unfit=answer.unfit)

    def _run(
        self,
        stream: BinaryIO,
        sample: Sample | None,
        start: float,
        limit_s: float | None,
        wanted: PixelsWanted,
        mask: MaskGrid | None = None,
        torchcodec: bool = False,
    ) -> Answer:
        """A job on an idle process, which is put back, or ended if it did not answer. Raises FileFault."""
        process = self._take()
        try:
            answer = process.run(stream, sample, start, limit_s or self._limit_s, wanted, mask, torchcodec)
        # Wherever the conversation broke off, this process cannot take another file.
        except BaseException:
            process.kill()
            raise
        finally:
            self._put_back(process)
        if answer.fault is not None:
            raise answer.fault
        return answer

    def _take(self) -> DecodingProcess:
        from vtrain.data.decoding.process import DecodingProcess

        with self._lock:
            if self._closed:  # a process started now would outlive the with block
                raise FileFault("was not read: the run ended", lasting=False)
            if self._idle:
                return self._idle.pop()
            process = DecodingProcess(self._threads, self._memory)
            self._all.add(process)
            return process

    def _put_back(self, process: DecodingProcess) -> None:
        with self._lock:
            if process.alive and not self._closed:
                self._idle.append(process)
            else:
                self._all.discard(process)
                process.close()


def _named(work: Callable[[JobT], ResultT], job: JobT) -> ResultT:
    """The work, in a thread of the pool; what goes wrong in it, a plugin's fault for one, says which file it was about."""
    with in_background(f"in a decoding thread, file {job.backend.location}/{job.ref.id}"):
        return work(job)


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
