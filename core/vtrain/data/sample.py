"""What training takes from one source file: which frames, which part of the picture, at which size, with which caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vtrain.contract import Caption, ClipShape, Size


class Box(NamedTuple):
    """A rectangle of stored pixels in the upright picture."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample. Slim and picklable: a dataset of a million is a tuple of these.

    id: "<dataset id>/<ref id>". dataset: its id; place: its number in plan.datasets. ref_id, size, version: of the
    source file. picture: the upright source picture in stored pixels; box: the part of it that is used.
    shape: the bucket. start: of the window, in seconds after the first frame. fps: after resampling. crop: how box was
    chosen. content: SHA-256 of the source's bytes as encoded, "" until that is known.
    """

    id: str
    dataset: str
    place: int
    ref_id: str
    size: int
    version: str
    picture: Size
    box: Box
    shape: ClipShape
    fps: float
    start: float
    crop: str
    caption: Caption
    content: str = ""

    @property
    def times(self) -> list[float]:
        """When each output frame is taken, in seconds after the source's first frame."""
        return [self.start + k / self.fps for k in range(self.shape.frames)]


@dataclass(frozen=True, slots=True)
class Left:
    """Why a file gives no sample.

    status: "dropped" by a rule of the configuration, or "failed" because the file is bad. kind: the reason in one or
    two words, the same for all files left out on these grounds. reason: for this file, with what to do about it.
    """

    status: str
    kind: str
    reason: str
