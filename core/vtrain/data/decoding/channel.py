"""A socket between a run and one of its decoding processes: framed messages, and open files handed over."""

from __future__ import annotations

import os
import socket
import struct
import time

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
