"""One decoding process as its parent sees it: started, given a file at a time, watched, killed."""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from vtrain.data.decoding.spool import is_local
from vtrain.data.decoding.video import FileFault
from vtrain.data.decoding.worker_process import Channel, ChannelClosed, Job
from vtrain.data.sample import MaskGrid, Sample

if TYPE_CHECKING:
    from torch import Tensor

_PROGRAM = ("-P", "-m", "vtrain.data.decoding.worker_process")
_LONGEST_ANSWER = 1 << 20
_LAST_WORDS = 4096
_START_S = 600.0
"""For a process to start and to import what it needs, which is not counted as a file's time."""

_FAREWELL_S = 10.0
"""For a process that closed its channel to end, with its own exit status."""

PixelsWanted = Callable[[str], bool]
"""Asked with the SHA-256 of a file's bytes whether its pixels are wanted."""


@dataclass(frozen=True)
class Answer:
    """How a job went: the columns of a probe, the pixels or the mask (None if not wanted), or the file's fault.

    unfit: why a file that was for torchcodec was decoded by PyAV, or "".
    """

    probe: tuple[Any, ...] = ()
    pixels: Tensor | None = None
    unfit: str = ""
    fault: FileFault | None = None


@dataclass
class _Clock:
    """Seconds left of a job's time. It stands still while the storage is waited for."""

    limit_s: float
    spent: float = 0.0

    @property
    def left(self) -> float:
        return max(0.0, self.limit_s - self.spent)


class DecodingProcess:
    """threads: of its decoders. memory: bytes it may take."""

    def __init__(self, threads: int, memory: int) -> None:
        self._memory = memory
        self._ended = False
        # A file: a pipe that nobody reads fills up, and then blocks who writes.
        self._last_words = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        # Closed here once the child has it: a channel ends only when every copy of its other end is closed.
        with theirs:
            command = [sys.executable, *_PROGRAM, str(theirs.fileno()), str(threads), str(memory)]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._last_words,
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C goes to the terminal's group: it is the run's to end this
                # It unpickles what this process imported, from wherever that was.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )

    @property
    def alive(self) -> bool:
        return not self._ended and self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End it at once; may be called from any thread."""
        self._ended = True
        self._process.kill()

    def close(self) -> None:
        """Kill it and let go of all that belongs to it."""
        self.kill()
        self._process.wait()
        self._channel.close()
        self._last_words.close()

    def run(
        self,
        stream: BinaryIO,
        sample: Sample | None,
        start: float,
        limit_s: float,
        wanted: PixelsWanted,
        mask: MaskGrid | None = None,
        torchcodec: bool = False,
    ) -> Answer:
        """Probe the file, decode a window of it, or average it as the mask of one.

        A process that does not answer is ended, and that is the fault.
        """
        local = is_local(stream)
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        clock = _Clock(limit_s)
        try:
            self._channel.send(pickle.dumps(Job(size, local, sample, start, mask, torchcodec)))
            self._await("begun")
            if local:
                self._channel.send_file(stream.fileno())
            return self._converse(stream, sample, mask, clock, wanted)
        except TimeoutError:
            self.kill()
            what = f"decoding it took longer than {limit_s:g} seconds (data.decode_timeout) and was stopped"
            return Answer(fault=FileFault(what))
        except ChannelClosed:
            return Answer(fault=self._death())

    def _converse(
        self, stream: BinaryIO, sample: Sample | None, mask: MaskGrid | None, clock: _Clock, wanted: PixelsWanted
    ) -> Answer:
        """Serve what the process asks for until it answers. Raises TimeoutError and ChannelClosed."""
        storage_failed = False
        while True:
            message = self._receive(clock)
            if "read" in message:
                part = _read(stream, *message["read"])
                # What the decoder says of a file whose bytes did not come is no word on the file.
                storage_failed |= part.startswith(b"!")
                self._channel.send(part)
            elif "content" in message:
                if not wanted(message["content"]):
                    self._channel.send(b"leave")
                    return Answer()
                self._channel.send(b"decode")
                self._await("ready")
            elif "probe" in message:
                return Answer(probe=tuple(message["probe"]))
            elif "pixels" in message and sample is not None:
                pixels = _pixels(self._channel.receive_file(clock.left), sample, mask)
                return Answer(pixels=pixels, unfit=str(message["unfit"]))
            elif "memory" in message:
                return Answer(
                    fault=FileFault(f"decoding it takes more than {self._memory / (1 << 30):g} GiB of memory")
                )
            elif "fault" in message:
                return Answer(fault=FileFault(message["fault"], lasting=message["lasting"] and not storage_failed))
            else:
                raise ChannelClosed

    def _await(self, word: str) -> None:
        """Until the process has imported what it needs, in time that is not the file's. Raises ChannelClosed."""
        if word not in self._receive(_Clock(_START_S)):
            raise ChannelClosed

    def _receive(self, clock: _Clock) -> dict[str, Any]:
        began = time.monotonic()
        try:
            message = json.loads(self._channel.receive(_LONGEST_ANSWER, clock.left))
        except ValueError:  # what a broken decoder wrote there costs its file, not the run
            message = None
        clock.spent += time.monotonic() - began
        if not isinstance(message, dict):
            raise ChannelClosed
        return message

    def _death(self) -> FileFault:
        """Why the process ended, from its exit status and its last line."""
        try:
            status = self._process.wait(_FAREWELL_S)
        except subprocess.TimeoutExpired:
            return FileFault("its decoder stopped answering")
        finally:
            self.kill()
        if status == -signal.SIGKILL:
            return FileFault("its decoder was killed, as the system does when memory runs out", lasting=False)
        if status < 0:
            return FileFault(f"its decoder crashed ({signal.Signals(-status).name})")
        self._last_words.seek(max(0, self._last_words.seek(0, os.SEEK_END) - _LAST_WORDS))
        lines = self._last_words.read().decode(errors="replace").strip().splitlines()
        return FileFault(f"its decoder stopped: {lines[-1] if lines else f'exit status {status}'}")


def _read(stream: BinaryIO, offset: int, size: int) -> bytes:
    """A part of a file for the process: "=" and the bytes, or "!" and the storage's error."""
    try:
        stream.seek(offset)
        return b"=" + stream.read(size)
    except OSError as error:
        # 5 is EIO: many storages raise an OSError without a number.
        return b"!" + json.dumps([error.errno or 5, error.strerror or str(error)]).encode()


def _pixels(file: int, sample: Sample, mask: MaskGrid | None) -> Tensor:
    """The frames, or the mask, in a memory file that the process handed over. Raises ChannelClosed if it has another size."""
    import torch

    shape = (3, *sample.shape) if mask is None else (len(mask.spans), *mask[1:])
    kind = torch.uint8 if mask is None else torch.float32
    try:
        length = os.fstat(file).st_size
        if length != math.prod(shape) * kind.itemsize:
            raise ChannelClosed
        return torch.frombuffer(mmap.mmap(file, length), dtype=kind).view(shape)
    finally:
        os.close(file)  # the mapping keeps the memory
