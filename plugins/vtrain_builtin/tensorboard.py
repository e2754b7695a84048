"""`tensorboard`: scalars, the configuration and stills of validation videos as TensorBoard event files.

TensorBoard has no player for mp4; a video is shown as a strip of frames, with the path of the file beside it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from vtrain.contract import Event, Logged, Options, RunInfo, TrackerSpec, Validated

if TYPE_CHECKING:
    import numpy as np

STRIP_HEIGHT = 240
"""Stills are scaled down to this many pixels of height, if they are higher."""


class TensorBoardOptions(Options):
    """Options of `tensorboard`."""

    stills: int = Field(8, ge=1, le=64, description="frames of a validation video shown side by side")
    flush_seconds: float = Field(30.0, gt=0, description="at most this long until numbers are on disk, in seconds")


class EventFile:
    """A TensorBoard event file, written at once.

    Not torch's SummaryWriter: it writes in a thread of its own, and when the folder is deleted that thread dies with a
    traceback, and whoever logs on waits for it for ever. A tracker has a thread of its own already.
    """

    def __init__(self, folder: Path, flush_seconds: float, purge_step: int) -> None:
        """purge_step: what other files of the folder say of this step and later ones is hidden."""
        self._folder, self._flush_seconds = folder, flush_seconds
        self._open()
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def _open(self) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()  # whole in the name's end too: a process may begin several files in a second
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}"
        self._path = self._folder / name
        self._file = self._path.open("ab")
        self._records, self._flushed = RecordWriter(self._file), time.monotonic()
        self._write(file_version="brain.Event:2")  # the first record of every event file
        self._file.flush()

    def add(self, summary: object, step: int) -> None:
        """A protocol buffer as torch.utils.tensorboard.summary makes them. A file that was deleted is begun again."""
        if not self._path.exists():
            self._file.close()
            self._open()
        self._write(summary=summary, step=step)
        if time.monotonic() - self._flushed >= self._flush_seconds:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def _write(self, **parts: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record

        self._records.write(Record(wall_time=time.time(), **parts).SerializeToString())


class TensorBoard:
    """The tracker. Its files are in `tensorboard` below the run's output folder."""

    def __init__(self, options: TensorBoardOptions) -> None:
        self._options = options
        self._file: EventFile | None = None
        self._folder = Path()
        self._warnings: list[str] = []

    @property
    def events(self) -> tuple[type[Event], ...]:
        return (Logged, Validated)

    def start(self, run: RunInfo, saved: Mapping[str, Any]) -> None:
        """On resume, what an earlier process logged after `run.step` is hidden."""
        from torch.utils.tensorboard.summary import text

        folder = self._folder = Path(run.output_dir) / "tensorboard"
        self._warnings += lost(folder, saved)
        # From step 0 too: a run that was killed before its first checkpoint starts again, and has a curve there already.
        self._file = EventFile(folder, self._options.flush_seconds, run.step + 1 if run.step else 0)
        config = json.dumps({"run": run.name, **run.config}, indent=2, default=str, ensure_ascii=False)
        # Indented, it is code to TensorBoard's Markdown.
        self._file.add(text("config", "\n".join("    " + line for line in config.splitlines())), run.step)  # type: ignore[no-untyped-call]

    def show(self, event: Event) -> None:
        if isinstance(event, Logged):
            for metrics in event.steps:
                self.scalars(metrics.step, metrics.scalars())
        elif isinstance(event, Validated):
            self.videos(event.step, event.files)

    def state(self) -> Mapping[str, Any]:
        """The event files that there are, and their sizes: all that a resumed run looks for."""
        return {"files": sizes(self._folder)}

    def warnings(self) -> Sequence[str]:
        said, self._warnings = self._warnings, []
        return said

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import scalar

        file = self._started()
        for name, value in values.items():
            file.add(scalar(name, value), step)  # type: ignore[no-untyped-call]

    def videos(self, step: int, files: Mapping[str, Path]) -> None:
        """One that is gone, or no video, is named in place of its stills."""
        from av.error import FFmpegError
        from torch.utils.tensorboard.summary import image, text

        file = self._started()
        for name, video in files.items():
            words = f"`{video}`"
            try:
                strip = film_strip(video, self._options.stills)
                file.add(image(f"samples/{name}", strip, dataformats="HWC"), step)  # type: ignore[no-untyped-call]
            except (OSError, ValueError, FFmpegError) as error:
                words += f" cannot be read: {error}"
            file.add(text(f"samples/{name}/file", words), step)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _started(self) -> EventFile:
        if self._file is None:
            raise RuntimeError("a tracker takes numbers between start and finish only")
        return self._file


def sizes(folder: Path) -> dict[str, int]:
    """Name of each event file -> bytes of it that are on the disk."""
    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        with suppress(OSError):  # somebody deletes it at this moment
            found[path.name] = path.stat().st_size
    return found


def lost(folder: Path, saved: Mapping[str, Any]) -> list[str]:
    """What is not there any more of the event files that there were at the checkpoint, in words. saved: its `state` then."""
    files = saved.get("files", {})
    if not isinstance(files, dict) or not all(
        type(size) is int and Path(name).name == name for name, size in files.items()
    ):
        return ["what the checkpoint says of its event files cannot be read"]
    there = sizes(folder)
    gone = [name for name, size in files.items() if there.get(name, -1) < size]
    if not gone:
        return []
    what = f"{len(gone)} of {len(files)} event files of earlier steps"
    return [f"{what} {'is' if len(gone) == 1 else 'are'} gone from {folder}, or cut: its curves lack steps"]


def film_strip(file: Path, stills: int) -> np.ndarray:
    """Up to `stills` frames of a video, evenly spaced from first to last, side by side: (h, n x w, 3) uint8 RGB."""
    import av
    import numpy as np

    with av.open(str(file)) as container:
        frames = list(container.decode(video=0))
    if not frames:
        raise ValueError(f"{file}: no frame")
    shown = sorted({round(place) for place in np.linspace(0, len(frames) - 1, min(stills, len(frames)))})
    height = min(frames[0].height, STRIP_HEIGHT)
    width = max(1, round(frames[0].width * height / frames[0].height))
    pictures = [frames[place].reformat(width=width, height=height).to_ndarray(format="rgb24") for place in shown]
    return np.concatenate(pictures, axis=1)


TENSORBOARD = TrackerSpec(
    name="tensorboard",
    summary="scalars and stills of validation videos as TensorBoard event files",
    options=TensorBoardOptions,
    build=TensorBoard,
)
