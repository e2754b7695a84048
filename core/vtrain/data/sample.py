"""What training takes from one source file: which frames, which part of the picture, at which size, with which caption."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from vtrain.contract import Caption, ClipShape, Family, Size, SourceRef

TRANSFORM_VERSION = 2
"""Raised when the pixels that `decode` makes of a file change: part of every video key, and of what decides over files."""

MASK_VERSION = 1
"""Raised when the numbers that `latent_mask` makes of a file change: part of every mask's key."""


class Box(NamedTuple):
    """A rectangle of stored pixels in the upright picture."""

    left: int
    top: int
    width: int
    height: int


class MaskGrid(NamedTuple):
    """What a mask is averaged to. spans: of each latent frame, the frames of the sample for which it stands; height, width:
    of the latents."""

    spans: tuple[range, ...]
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class MaskFile:
    """The file of a clip's mask, in the clip's dataset: an image or a video, white where it trains.

    content: SHA-256 of its bytes, "" until that is known.
    """

    ref: SourceRef
    content: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample. Slim and picklable: a dataset of a million is a tuple of these.

    id: "<dataset id>/<ref id>", and "#<number>" from 1 where a clip is cut into several samples. dataset: its id;
    place: its number in plan.datasets. ref_id, size, version: of the source file. picture: the upright source picture
    in stored pixels; box: the part of it that is used. shape: the bucket. starts: of the windows of which a draw uses
    one, in seconds after the first frame; each is one cached entry. fps: after resampling. crop: how box was chosen.
    captions: of which a draw uses one; each is one cached entry. content: SHA-256 of the source's bytes as encoded, ""
    until that is known. mask: its mask's file, None for none. chosen: numbers of the frames of a window that are
    decoded, ascending, as many as shape says; None: all.
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
    starts: tuple[float, ...]
    crop: str
    captions: tuple[Caption, ...]
    content: str = ""
    mask: MaskFile | None = None
    chosen: tuple[int, ...] | None = None

    @property
    def file(self) -> str:
        """Names its file among all datasets: "<dataset id>/<ref id>"."""
        return f"{self.dataset}/{self.ref_id}"

    @property
    def mask_ref(self) -> str:
        """Id of its mask's file, "" for none."""
        return self.mask.ref.id if self.mask is not None else ""

    @property
    def ref(self) -> SourceRef:
        """The source file, as its backend opens it."""
        return SourceRef(self.ref_id, self.size, self.version)

    def times(self, start: float) -> list[float]:
        """When each output frame of the window at `start` is taken, in seconds after the source's first frame."""
        return [start + k / self.fps for k in (range(self.shape.frames) if self.chosen is None else self.chosen)]

    def only(self, frames: tuple[int, ...]) -> Sample:
        """The same with some of its frames alone: they are the same pictures as among all."""
        return replace(self, shape=self.shape._replace(frames=len(frames)), chosen=frames)


@dataclass(frozen=True, slots=True)
class Skipped:
    """Why a file gives no sample.

    status: "dropped" by a rule of the configuration, or "failed" because the file is bad. kind: the reason in one or
    two words, the same for all files skipped on these grounds. reason: for this file, with what to do about it.
    """

    status: str
    kind: str
    reason: str


def mask_grid(family: Family, shape: ClipShape) -> MaskGrid:
    """Of the latents of clips of one shape."""
    latents = family.latent_shape(shape)
    spans = tuple(family.pixel_frames(frame) for frame in range(latents.frames))
    return MaskGrid(spans, latents.height, latents.width)
