"""The process in which untrusted files are probed and decoded, and the socket to it: framed messages, open files handed over.

It is given one open file at a time, and nothing else. It reads a local file by itself and asks its parent for the bytes of
any other. Its answers are JSON and, for pixels, a shared memory file: what a broken decoder says is never unpickled. It
ends when its parent does. Imports torch only if it decodes.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import math
import mmap
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

from vtrain.data.decoding.probe import probe
from vtrain.data.decoding.spool import hashed
from vtrain.data.decoding.video import FileFault
from vtrain.data.sample import MaskGrid, Sample

if TYPE_CHECKING:
    from torch import Tensor


_LENGTH = struct.Struct(">Q")


class ChannelClosed(Exception):
    """The other side is gone."""


class Channel:
    """Messages both ways, one after the other, over a Unix stream socket that it owns."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        """Raises ChannelClosed."""
        self._socket.settimeout(None)
        try:
            self._socket.sendall(_LENGTH.pack(len(message)) + message)
        except OSError as error:
            raise ChannelClosed from error

    def receive(self, most: int, limit_s: float | None = None) -> bytes:
        """The next message. Raises ChannelClosed, also for one of more than `most` bytes, and TimeoutError."""
        end = None if limit_s is None else time.monotonic() + limit_s
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, end))
        if length > most:
            raise ChannelClosed
        return self._exactly(length, end)

    def send_file(self, file: int) -> None:
        """Hand over an open file descriptor; this side keeps its own. Raises ChannelClosed."""
        try:
            socket.send_fds(self._socket, [b"f"], [file])
        except OSError as error:
            raise ChannelClosed from error

    def receive_file(self, limit_s: float | None = None) -> int:
        """A file descriptor that `send_file` sent; the caller closes it. Raises ChannelClosed and TimeoutError."""
        self._socket.settimeout(limit_s)
        try:
            _, files, _, _ = socket.recv_fds(self._socket, 1, 1)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosed from error
        if len(files) != 1:
            raise ChannelClosed
        os.set_inheritable(files[0], False)
        return files[0]

    def _exactly(self, length: int, end: float | None) -> bytes:
        parts, missing = [], length
        while missing:
            part = self._some(min(missing, 1 << 20), end)
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _some(self, length: int, end: float | None) -> bytes:
        # Never 0, which makes a socket non-blocking: what it then raises is no TimeoutError.
        self._socket.settimeout(None if end is None else max(1e-3, end - time.monotonic()))
        try:
            part = self._socket.recv(length)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosed from error
        if not part:
            raise ChannelClosed
        return part


_PDEATHSIG = 1
_LONGEST = 1 << 26
"""Bytes of the longest message taken: parts of files are asked for in smaller ones."""

_PART = 1 << 20


@dataclass(frozen=True)
class Job:
    """What is to be done with a file: probe it or, if `sample` is given, decode the window at `start`.

    mask: the file is the sample's mask, to be averaged to this. size: of the file.
    local: an open file is handed over after this; otherwise its bytes are asked for.
    torchcodec: whether that decodes it, if it is given the file.
    """

    size: int
    local: bool
    sample: Sample | None = None
    start: float = 0.0
    mask: MaskGrid | None = None
    torchcodec: bool = False


class ParentFile(io.RawIOBase):
    """The parent's open stream, read through the channel. Raises OSError as the storage did."""

    def __init__(self, channel: Channel, size: int) -> None:
        self._channel, self._size, self._at = channel, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(22, "Invalid argument")
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """As many bytes as there are, in parts."""
        left, parts = size if size >= 0 else max(0, self._size - self._at), []
        while left:
            part = self._part(min(left, _PART))
            if not part:
                break
            parts.append(part)
            self._at += len(part)
            left -= len(part)
        return b"".join(parts)

    def _part(self, size: int) -> bytes:
        answer = self._ask(size)
        if answer[:1] == b"!":
            number, text = json.loads(answer[1:])
            raise OSError(number, text)
        return answer[1:]

    def _ask(self, size: int) -> bytes:
        _say(self._channel, read=[self._at, size])
        return self._channel.receive(_LONGEST)


def main() -> None:
    """Arguments: the socket's number, threads, bytes of memory."""
    end, threads, memory = map(int, sys.argv[1:])
    _limit(memory)
    channel = Channel(socket.socket(fileno=end))
    gc.freeze()  # what is imported by now is not walked again after each file
    while True:
        gc.collect()  # the last file's frames, of which PyAV makes cycles
        try:
            job = pickle.loads(channel.receive(_LONGEST))  # noqa: S301 (from the parent, which started this process)
        except ChannelClosed:
            return
        _say(channel, begun=True)
        with _file(channel, job) as stream:
            _answer(channel, job, stream, threads)


def _import_decode(torchcodec: bool) -> None:
    """With torch: seconds, and not for files whose pixels nobody wants."""
    for module in ("vtrain.data.decoding.decode", *(("torchcodec.decoders",) if torchcodec else ())):
        if module not in sys.modules:
            importlib.import_module(module)
            gc.freeze()


def _limit(memory: int) -> None:
    """No core dumps, no more memory than this, and no life after the parent's. Signals are the parent's business: a terminal, Slurm
    and systemd send theirs to all processes of a run, which still decodes what its last step needs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory if most == resource.RLIM_INFINITY else min(memory, most), most))
    if sys.platform == "linux":
        # A decoder that hangs never reads the channel, and would not notice that the parent is gone.
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _file(channel: Channel, job: Job) -> BinaryIO:
    if job.local:
        file = open(channel.receive_file(), "rb")  # noqa: PTH123, SIM115 (a descriptor; the caller closes it)
        file.seek(0)  # a handed-over descriptor shares its position with the parent's
        return file
    return cast("BinaryIO", ParentFile(channel, job.size))


def _answer(channel: Channel, job: Job, stream: BinaryIO, threads: int) -> None:
    """Do the job and say how it went; anything but a fault of the file ends the process, and the parent sees that."""
    try:
        if job.sample is None:
            _say(channel, probe=list(asdict(probe(stream)).values()))
        else:
            _decode(channel, job, job.sample, stream, threads)
    except FileFault as fault:
        _say(channel, fault=fault.reason, lasting=fault.lasting)
    except MemoryError:
        _say(channel, memory=True)


def _decode(channel: Channel, job: Job, sample: Sample, stream: BinaryIO, threads: int) -> None:
    """Tell the content's hash; if the parent then wants the pixels, decode into a memory file and hand it over."""
    file = _memory_file()
    try:
        with hashed(stream) as (content, copy):
            _say(channel, content=content)
            if channel.receive(_LONGEST) != b"decode":
                return
            _import_decode(job.torchcodec)
            _say(channel, ready=True)
            unfit = _write(file, job, sample, copy, threads)
        _say(channel, pixels=True, unfit=unfit)
        channel.send_file(file)
    finally:
        os.close(file)


def _write(file: int, job: Job, sample: Sample, stream: BinaryIO, threads: int) -> str:
    """Put the window's pixels, uint8 (3, F, h, w), or its mask, fp32 (f, h, w), into a memory file.

    Returns why a file that was for torchcodec is decoded by PyAV, or "". Raises FileFault.
    """
    import torch

    from vtrain.data.decoding.masks import latent_mask

    torch.set_num_threads(min(torch.get_num_threads(), threads))
    shape = (3, *sample.shape) if job.mask is None else (len(job.mask.spans), *job.mask[1:])
    kind = torch.uint8 if job.mask is None else torch.float32
    length = math.prod(shape) * kind.itemsize
    os.ftruncate(file, length)
    pixels = torch.frombuffer(mmap.mmap(file, length), dtype=kind).view(shape)
    if job.mask is None:
        return _pixels(stream, job, sample, pixels)
    pixels.copy_(latent_mask(stream, sample, job.start, job.mask.spans, job.mask[1:]))
    return ""


def _pixels(stream: BinaryIO, job: Job, sample: Sample, into: Tensor) -> str:
    """Decode. Returns why a file that was for torchcodec is decoded by PyAV, or "". Raises FileFault."""
    from vtrain.data.decoding.decode import decode

    unfit = ""
    if job.torchcodec:
        from vtrain.data.decoding import torchcodec_frames

        unfit = torchcodec_frames.decode(stream, sample, job.start, into)
        stream.seek(0)
    if unfit or not job.torchcodec:
        decode(stream, sample, job.start, into)
    return unfit


def _say(channel: Channel, **message: object) -> None:
    channel.send(json.dumps(message).encode())


def _memory_file() -> int:
    """Shared memory that vanishes with its last user, and is not bound by the size of /dev/shm."""
    if sys.platform == "linux":
        return os.memfd_create("vtrain-pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


if __name__ == "__main__":
    main()
