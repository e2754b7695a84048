"""`tensorboard`: scalars, the configuration and stills of validation videos as TensorBoard event files.

TensorBoard has no player for mp4; a video is shown as a strip of frames, with the path of the file beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from vtrain.contract import Event, Logged, Options, RunInfo, TrackerSpec, Validated

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

STRIP_HEIGHT = 240
"""Stills are scaled down to this many pixels of height, if they are higher."""


class TensorBoardOptions(Options):
    """Options of `tensorboard`."""

    stills: int = Field(8, ge=1, le=64, description="frames of a validation video shown side by side")
    flush_seconds: float = Field(30.0, gt=0, description="at most this long until numbers are on disk, in seconds")


class TensorBoard:
    """The tracker. Its files are in `tensorboard` below the run's output folder."""

    def __init__(self, options: TensorBoardOptions) -> None:
        self._options = options
        self._writer: SummaryWriter | None = None

    @property
    def events(self) -> tuple[type[Event], ...]:
        return (Logged, Validated)

    def start(self, run: RunInfo, saved: Mapping[str, Any]) -> None:
        """On resume, what an earlier process logged after `run.step` is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            log_dir=str(Path(run.output_dir) / "tensorboard"),
            purge_step=run.step + 1 if run.step else None,
            flush_secs=self._options.flush_seconds,
        )
        text = json.dumps({"run": run.name, **run.config}, indent=2, default=str, ensure_ascii=False)
        indented = "\n".join("    " + line for line in text.splitlines())
        self._writer.add_text("config", indented, run.step)

    def show(self, event: Event) -> None:
        if isinstance(event, Logged):
            for metrics in event.steps:
                self.scalars(metrics.step, metrics.scalars())
        elif isinstance(event, Validated):
            self.videos(event.step, event.files)

    def state(self) -> Mapping[str, Any]:
        return {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        writer = self._started()
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def videos(self, step: int, files: Mapping[str, Path]) -> None:
        """Raises PyAV's errors for a file that is no video."""
        writer = self._started()
        for name, file in files.items():
            strip = film_strip(file, self._options.stills)
            writer.add_image(f"samples/{name}", strip, step, dataformats="HWC")
            writer.add_text(f"samples/{name}/file", f"`{file}`", step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _started(self) -> SummaryWriter:
        if self._writer is None:
            raise RuntimeError("a tracker takes numbers between start and finish only")
        return self._writer


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
