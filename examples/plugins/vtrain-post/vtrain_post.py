"""`post`: a run's numbers, videos and warnings, each event a request with JSON to an HTTP service."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.request import Request, urlopen
from uuid import uuid4

from pydantic import Field

from vtrain.contract import Event, Failed, Logged, Options, RunInfo, TrackerSpec, Validated, Warned, free, hookimpl
from vtrain.contract.events import as_json


class PostOptions(Options):
    """Options of `post`."""

    url: str = free(pattern=r"^https?://[^@?#]+$", description="of the service, without a password or a query")
    timeout_s: float = Field(5.0, gt=0, description="seconds after which a request counts as failed")
    keep: int = Field(
        1000, ge=1, description="events that wait while the service is down; with more, the tracker fails"
    )


class Post:
    """The tracker. What the service does not take waits, and is sent again with the next event."""

    events: tuple[type[Event], ...] = (Logged, Validated, Warned, Failed)

    def __init__(self, options: PostOptions) -> None:
        self._options, self._run = options, ""
        self._waiting: deque[bytes] = deque()
        self._warnings: list[str] = []

    def start(self, run: RunInfo, saved: Mapping[str, Any]) -> None:
        self._run = str(saved.get("run") or uuid4().hex)
        self._send({"event": "start", "name": run.name, "step": run.step})

    def show(self, event: Event) -> None:
        self._send(as_json(event))

    def state(self) -> Mapping[str, Any]:
        return {"run": self._run}

    def warnings(self) -> Sequence[str]:
        said, self._warnings = self._warnings, []
        return said

    def finish(self) -> None:
        self._send({"event": "finish"})
        if self._waiting:
            raise ConnectionError(f"{len(self._waiting)} events were not taken by {self._options.url}")

    def _send(self, record: Mapping[str, Any]) -> None:
        self._waiting.append(json.dumps(finite({"run": self._run, **record}), allow_nan=False).encode())
        try:
            while self._waiting:
                request = Request(self._options.url, self._waiting[0], {"Content-Type": "application/json"})
                urlopen(request, timeout=self._options.timeout_s).close()
                self._waiting.popleft()
        except OSError as error:  # HTTPError is one too
            if len(self._waiting) > self._options.keep:
                raise
            if len(self._waiting) == 1:  # warned of once, not for each event that waits
                self._warnings.append(f"{self._options.url} takes no events, which wait for it: {error}")


def finite(record: Mapping[str, Any]) -> Any:
    """The same with null for numbers that JSON has no word for."""
    return json.loads(json.dumps(record), parse_constant=lambda word: None)


@hookimpl
def vtrain_trackers() -> tuple[TrackerSpec, ...]:
    return (TrackerSpec("post", "events as JSON, posted to an HTTP service", PostOptions, Post),)
