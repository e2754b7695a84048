"""Decoding processes: their answers are those of this process, and nothing that a file does to one takes the run down.

A process that really dies is made with a sitecustomize on its path: it looks at the first bytes of each file, and does
what they say instead of decoding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import av
import numpy as np
import psutil
import pytest
import torch

from vtrain.contract import Caption, ClipShape, Size, SourceRef
from vtrain.data.decoding import worker
from vtrain.data.decoding.decode import decode
from vtrain.data.decoding.probe import probe
from vtrain.data.decoding.video import FileFault
from vtrain.data.decoding.worker import DecodeJob, ProbeJob, Workers
from vtrain.data.sample import Box, Sample
from vtrain_builtin.folder import LocalFolder

STUB = """
import ctypes, os, signal, time
from contextlib import contextmanager
from vtrain.data.decoding import video

real = video.open_video

@contextmanager
def open_video(stream, *rest):
    word = stream.read(8)
    stream.seek(0)
    if word == b"SEGFAULT":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == b"SLEEPING":
        time.sleep(1000)
    if word == b"SPINNING":  # never gives the interpreter back
        ctypes.PyDLL(None).sleep(1000)
    if word == b"DEVOURER":
        hoard = [bytearray(1 << 24) for _ in range(1 << 20)]
    if word == b"MISTAKEN":
        raise ValueError("not what the decoder expected")
    with real(stream, *rest) as opened:
        yield opened

video.open_video = open_video
"""


class Strange:
    """A storage whose files are no local files. It counts the bytes that are read, and may fail."""

    location = "strange://place"

    def __init__(self, files: dict[str, bytes], fail_after: int | None = None, wait_s: float = 0.0) -> None:
        self.files, self.fail_after, self.wait_s, self.given = files, fail_after, wait_s, 0
        self.asked, self.reads = False, 0

    def refs(self):
        return iter([SourceRef(name, len(data), "1") for name, data in sorted(self.files.items())])

    def open(self, ref: SourceRef) -> io.BytesIO:
        storage = self

        class File(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                storage.asked, storage.reads = True, storage.reads + 1
                time.sleep(storage.wait_s)
                data = super().read(size)
                storage.given += len(data)
                if storage.fail_after is not None and storage.given > storage.fail_after:
                    raise OSError(104, "Connection reset by peer")
                return data

        return File(self.files[ref.id])


def ref_of(file: Path) -> SourceRef:
    status = file.stat()
    return SourceRef(file.name, status.st_size, str(status.st_mtime_ns))


def sample_of(data: bytes, name: str = "a.mp4") -> Sample:
    """17 frames at 16 a second, the whole picture at half its size."""
    return Sample(
        id=f"clips/{name}", dataset="clips", place=0, ref_id=name, size=len(data), version="1",
        picture=Size(128, 64), box=Box(0, 0, 128, 64), shape=ClipShape(17, 32, 64), fps=16.0, starts=(0.0,),
        crop="center", captions=(Caption(""),),
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    (tmp_path / "files").mkdir()
    return LocalFolder(str(tmp_path / "files"))


@pytest.fixture
def put(folder: LocalFolder) -> Callable[[str, bytes], SourceRef]:
    def put(name: str, data: bytes) -> SourceRef:
        file = Path(folder.location) / name
        file.write_bytes(data)
        return ref_of(file)

    return put


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding processes do what a file's first bytes say."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "sitecustomize.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    """children(): the decoding processes that this test started."""
    before = psutil.Process().children()

    def started() -> list[psutil.Process]:
        found = [child for child in psutil.Process().children() if child not in before]
        return [child for child in found if "vtrain.data.decoding.worker_process" in child.cmdline()]

    return started


def test_a_local_file_is_probed_and_decoded_as_here(folder, put, make_video) -> None:
    data = make_video(frames=18, fps=16)
    ref = put("a.mp4", data)
    sample = sample_of(data)
    with Workers(1, 60) as workers:
        assert workers.probe(folder, ref) == probe(io.BytesIO(data))
        content, pixels = workers.decode(folder, sample, 0.0)
    assert content == hashlib.sha256(data).hexdigest()
    assert torch.equal(pixels, decode(io.BytesIO(data), sample, 0.0))


def test_a_file_of_another_storage_is_read_through_the_parent_once(make_video) -> None:
    data = make_video(frames=18, fps=16)
    storage = Strange({"a.mp4": data})
    sample = sample_of(data)
    with Workers(1, 60) as workers:
        assert workers.probe(storage, SourceRef("a.mp4", len(data), "1")) == probe(io.BytesIO(data))
        storage.given = 0
        content, pixels = workers.decode(storage, sample, 0.0)
    assert storage.given == len(data)
    assert content == hashlib.sha256(data).hexdigest()
    assert torch.equal(pixels, decode(io.BytesIO(data), sample, 0.0))


def test_no_process_is_started_before_the_first_file(children, folder) -> None:
    with Workers(2, 60):
        assert not children()


def test_a_process_that_only_probes_imports_no_torch(children, folder, put, make_video) -> None:
    ref = put("a.mp4", make_video(frames=5))
    with Workers(1, 60) as workers:
        workers.probe(folder, ref)
        (process,) = children()
        assert not [file for file in process.memory_maps() if "libtorch" in file.path]
        assert process.memory_info().rss < 150 << 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_leaves_its_decoders_alive(
    children, folder, put, make_video, number
) -> None:
    """Slurm and systemd send theirs so; the run ends by itself, and may need them for its last step."""
    ref = put("a.mp4", make_video(frames=5))
    with Workers(1, 60) as workers:
        found = workers.probe(folder, ref)
        (process,) = children()
        process.send_signal(number)
        assert workers.probe(folder, ref) == found
        assert children() == [process]


@pytest.mark.usefixtures("stub")
def test_a_decoder_that_crashes_is_a_fault_of_the_file_and_the_next_file_is_decoded(folder, put, make_video) -> None:
    bad, good = put("bad.mp4", b"SEGFAULT" * 10), put("good.mp4", make_video(frames=5))
    with Workers(1, 60) as workers:
        for _ in range(2):
            with pytest.raises(FileFault, match=r"^its decoder crashed \(SIGSEGV\)$") as caught:
                workers.probe(folder, bad)
            assert caught.value.lasting
            assert workers.probe(folder, good).frames == 5


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("word", [b"SLEEPING", b"SPINNING"])
def test_a_decoder_that_hangs_is_stopped_at_the_limit(folder, put, make_video, word) -> None:
    bad, good = put("bad.mp4", word), put("good.mp4", make_video(frames=5))
    with Workers(1, 60) as workers:
        workers.probe(folder, good)
        ((_, found),) = workers.probed([ProbeJob(folder, bad, limit_s=0.5)])
        assert isinstance(found, FileFault)
        assert found.reason == "decoding it took longer than 0.5 seconds (data.decode_timeout) and was stopped"
        assert found.lasting
        assert workers.probe(folder, good).frames == 5


@pytest.mark.usefixtures("stub")
def test_a_decoder_that_eats_memory_is_stopped_at_the_limit(folder, put, make_video) -> None:
    bad, good = put("bad.mp4", b"DEVOURER"), put("good.mp4", make_video(frames=5))
    with Workers(1, 60, memory=1 << 29) as workers:
        with pytest.raises(FileFault, match=r"^decoding it takes more than 0\.5 GiB of memory$"):
            workers.probe(folder, bad)
        assert workers.probe(folder, good).frames == 5


@pytest.mark.usefixtures("stub")
def test_an_error_that_nobody_foresaw_is_told_by_its_last_line(folder, put) -> None:
    bad = put("bad.mp4", b"MISTAKEN")
    with Workers(1, 60) as workers, pytest.raises(FileFault) as caught:
        workers.probe(folder, bad)
    assert caught.value.reason == "its decoder stopped: ValueError: not what the decoder expected"


@pytest.mark.usefixtures("stub")
def test_a_crash_in_the_middle_of_many_costs_one_file(folder, put, make_video) -> None:
    """Outcomes come in order, whichever process is faster."""
    data = make_video(frames=18, fps=16)
    names = [f"{k}.mp4" for k in range(6)]
    for name in names:
        put(name, b"SEGFAULT" if name == "2.mp4" else data)
    jobs = [DecodeJob(folder, sample_of(data, name), 0.0) for name in names]
    with Workers(2, 60) as workers:
        outcomes = list(workers.decoded(jobs, ahead=3))
    assert [job.sample.ref_id for job, _ in outcomes] == names
    assert [done.fault.reason if done.fault else None for _, done in outcomes] == [
        None, None, "its decoder crashed (SIGSEGV)", None, None, None,
    ]  # fmt: skip
    assert [done.content is not None for _, done in outcomes] == [True] * 6  # the bytes were read before the crash
    assert [done.pixels is not None for _, done in outcomes] == [True, True, False, True, True, True]


def test_pixels_that_are_not_wanted_are_not_decoded(folder, put, make_video) -> None:
    """Asked with the content's hash, as a cache that has them already is."""
    data = make_video(frames=18, fps=16)
    put("a.mp4", data)
    asked: list[str] = []
    with Workers(1, 60) as workers:
        job = DecodeJob(folder, sample_of(data), 0.0, wanted=lambda content: bool(asked.append(content)))
        ((_, done),) = workers.decoded([job])
        assert asked == [done.content] == [hashlib.sha256(data).hexdigest()]
        assert (done.pixels, done.fault) == (None, None)
        assert workers.decode(folder, job.sample, 0.0)[1].shape == (3, *job.sample.shape)


def test_a_storage_that_fails_is_no_lasting_fault_of_the_file(make_video) -> None:
    data = make_video(frames=18, fps=16)
    storage = Strange({"a.mp4": data}, fail_after=100)
    with Workers(1, 60) as workers:
        with pytest.raises(FileFault, match="Connection reset by peer") as caught:
            workers.probe(storage, SourceRef("a.mp4", len(data), "1"))
        assert not caught.value.lasting
        with pytest.raises(FileFault, match="Connection reset by peer") as caught:
            workers.decode(storage, sample_of(data), 0.0)
        assert not caught.value.lasting


def test_waiting_for_a_slow_storage_does_not_count(make_video) -> None:
    data = make_video(frames=5)
    storage = Strange({"a.mp4": data}, wait_s=0.5)
    with Workers(1, 60) as workers:
        workers.probe(Strange({"a.mp4": data}), SourceRef("a.mp4", len(data), "1"))  # the process is up
        ((_, found),) = workers.probed([ProbeJob(storage, SourceRef("a.mp4", len(data), "1"), limit_s=1.4)])
        assert not isinstance(found, FileFault)
    assert storage.wait_s * storage.reads > 1.4


def test_a_missing_file_is_told_as_here(folder) -> None:
    with Workers(1, 60) as workers, pytest.raises(FileFault, match=r"^cannot be opened: No such file") as caught:
        workers.probe(folder, SourceRef("gone.mp4", 5, "1"))
    assert not caught.value.lasting


class Buggy(Strange):
    """A storage whose plugin has a bug, of whatever kind."""

    def __init__(self, error: BaseException) -> None:
        super().__init__({"a.mp4": b"", "b.mp4": b""})
        self.error = error

    def open(self, ref: SourceRef) -> io.BytesIO:
        raise type(self.error)(*self.error.args)


def test_a_bug_of_a_storages_plugin_arrives_as_what_it_is_and_names_the_file() -> None:
    storage = Buggy(KeyError("etag"))
    jobs = [ProbeJob(storage, ref) for ref in storage.refs()]
    with Workers(2, limit_s=20) as workers, pytest.raises(KeyError, match="etag") as raised:
        list(workers.probed(jobs))
    assert raised.value.__notes__ == ["in a decoding thread, file strange://place/a.mp4"]


def test_a_storages_plugin_that_ends_its_thread_leaves_nobody_waiting() -> None:
    """A thread pool loses the job of a thread that ends: whoever waits for it would wait for ever."""
    storage = Buggy(SystemExit(3))
    with (
        Workers(1, limit_s=20) as workers,
        pytest.raises(RuntimeError, match=r"SystemExit \(3\) was raised in a decod"),
    ):
        list(workers.probed([ProbeJob(storage, ref) for ref in storage.refs()]))


def test_work_begins_no_further_ahead_than_asked(folder, put, make_video) -> None:
    """So many windows are in memory, and no more."""
    ref = put("a.mp4", make_video(frames=5))
    begun: list[int] = []

    def jobs():
        for k in range(10):
            begun.append(k)
            yield ProbeJob(folder, ref)

    with Workers(1, 60) as workers:
        outcomes = workers.probed(jobs(), ahead=2)
        for k in range(5):
            next(outcomes)
            assert len(begun) == k + 3
        outcomes.close()


@pytest.mark.usefixtures("stub")
def test_leaving_the_block_stops_a_process_that_hangs(children, folder, put) -> None:
    bad = put("bad.mp4", b"SLEEPING")
    with Workers(2, 600) as workers:
        Thread(target=workers.probe, args=(folder, bad), daemon=True).start()
        while len(children()) < 1:
            time.sleep(0.05)
    assert not children()


def test_memory_does_not_grow_with_the_frames_of_a_window(children, folder, put, monkeypatch) -> None:
    """200 frames of 1280x720 are 553 MB as RGB; a process decodes them in the memory that 10 take, within 64 MB.

    With two threads, however many cores there are: each thread of a decoder has pictures of its own.
    """
    monkeypatch.setattr(worker, "available_cpus", lambda: 2)
    with av.open(target := io.BytesIO(), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": "50"}
        for k in range(200):
            plain = np.full((720, 1280, 3), k, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(plain, format="rgb24")))
        container.mux(stream.encode())
    put("a.mp4", target.getvalue())
    peaks = {}
    for frames in (10, 200):
        sample = dataclasses.replace(
            sample_of(target.getvalue()),
            picture=Size(1280, 720), box=Box(0, 0, 1280, 720), shape=ClipShape(frames, 36, 64),
        )  # fmt: skip
        with Workers(1, 60) as workers:
            _, pixels = workers.decode(folder, sample, 0.0)
            (process,) = children()
            status = Path(f"/proc/{process.pid}/status").read_text()
        assert pixels.shape == (3, frames, 36, 64)
        peaks[frames] = int(status.split("VmHWM:")[1].split()[0]) << 10
    assert peaks[200] < peaks[10] + (64 << 20), "all frames as they lie in the file are 500 MiB more"


def test_leaving_the_block_does_not_wait_for_a_storage_that_does_not_answer(make_video) -> None:
    data = make_video(frames=5)
    storage = Strange({"a.mp4": data}, wait_s=60)
    ref = SourceRef("a.mp4", len(data), "1")
    with Workers(1, 600) as workers:
        Thread(target=workers.probe, args=(storage, ref), daemon=True).start()
        while not storage.asked:
            time.sleep(0.05)
    assert storage.given == 0, "its answer was waited for"


RUN = """
import sys
from pathlib import Path
from vtrain.contract import SourceRef
from vtrain.data.decoding.worker import ProbeJob, Workers
from vtrain_builtin.folder import LocalFolder

folder = LocalFolder(sys.argv[1])
refs = list(folder.refs())
with Workers(2, 600) as workers:
    workers.probe(folder, refs[-1])
    print("ready", flush=True)
    for _ in workers.probed(ProbeJob(folder, ref) for ref in refs):
        pass
"""


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_when_the_run_is_interrupted_or_killed(folder, put, make_video, tmp_path, way) -> None:
    """Both processes hang in a decoder; the run's whole terminal gets Ctrl-C, or the run is killed without a word."""
    put("a.mp4", b"SPINNING")
    put("b.mp4", b"SLEEPING")
    put("c.mp4", make_video(frames=5))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUN), folder.location],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, process_group=0,
    )  # fmt: skip
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 100
        while len(busy := psutil.Process(run.pid).children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(busy) == 2
        time.sleep(0.5)
        os.killpg(run.pid, way)
        assert run.wait(60) == (-way if way == signal.SIGKILL else -signal.SIGINT)
        _, left = psutil.wait_procs(busy, timeout=60)
        assert not left
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
