"""A TCP proxy that does to connections what networks and busy servers do."""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

BUSY = b"HTTP/1.1 %d Busy\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"


@dataclass(frozen=True)
class Fault:
    """What happens to one request. kind: "drop" the connection after `after` bytes of the answer, "stall", or an HTTP status."""

    kind: str
    after: int = 0


class Proxy:
    """Listens on loopback and passes on to `target`, but for requests whose head holds `match`: each takes the next fault.

    requests: heads of the requests that matched. url: where it listens.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (str(parts.hostname), int(parts.port or 80))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.match = b"GET"
        self.faults: deque[Fault] = deque()
        self.requests: list[bytes] = []
        self._closing = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            left: int | None = None
            while not self._closing.is_set():
                ready, _, _ = select.select([client, server], [], [], 0.5)
                if client in ready:
                    head = _received(client)
                    if not head:
                        return
                    if self.match in head:
                        self.requests.append(head)
                        fault = self.faults.popleft() if self.faults else None
                        if fault is not None and fault.kind == "stall":
                            self._closing.wait(30)
                            return
                        if fault is not None and fault.kind != "drop":
                            body = b"<Error><Code>SlowDown</Code><Message>busy</Message></Error>"
                            client.sendall(BUSY % (int(fault.kind), len(body), body))
                            return
                        left = fault.after if fault is not None else None
                    server.sendall(head)
                if server in ready:
                    data = _received(server)
                    if not data:
                        return
                    client.sendall(data if left is None else data[:left])
                    if left is not None and len(data) >= left:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
                    left = None if left is None else left - len(data)


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(1 << 16)
    except OSError:
        return b""


@pytest.fixture
def proxy(s3_server: str) -> Iterator[Proxy]:
    """Before the S3 server."""
    made = Proxy(s3_server)
    yield made
    made.close()


@pytest.fixture
def fault() -> type[Fault]:
    return Fault
