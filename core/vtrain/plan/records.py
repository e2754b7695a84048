"""A plan: what a run will do, decided before anything heavy is loaded. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Literal

from vtrain.config.record import Config
from vtrain.config.tables import DataTable
from vtrain.contract import ClipShape, DataBackend, DType, Family, Regularizer, Sampler, Size, SupportsCaptions

CaptionsFrom = Literal["textfile", "filename", "instance_prompt", "csv", "parquet", "json", "backend"]


@dataclass(frozen=True)
class MasksPlan:
    """[data.masks]. folder: of the dataset, in which masks have their clips' names, "/"-separated, no "/" at its ends.

    invert: whether black trains, not white. missing: what becomes of a clip without a mask: "whole" (all of it trains) or
    "drop". where: its place in the configuration file.
    """

    folder: str
    invert: bool = False
    missing: Literal["whole", "drop"] = "whole"
    where: str = ""


@dataclass(frozen=True)
class DatasetPlan:
    """One enabled [[data]] table, every default resolved.

    where: its place in the file. sizes: the buckets. frames, min_frames: of a training clip at most and at least, counted
    after resampling, accepted by the family's frame rule. fps: after resampling, None for each clip's own; every n-th frame
    of that is taken, n = table.video.frame_step. max_frames: of a piece that a longer clip is cut into, None: it stays
    whole. crop_seed: of the places of crop = "random". masks: None for none. image_to_video: the share of its clips' draws
    that are trained as image-to-video, from 0 to 1.
    decoder: "" for PyAV, else the name and version of what decodes instead, as they stand in the keys of entries.
    """

    id: str
    where: str
    backend: DataBackend
    table: DataTable
    sizes: tuple[Size, ...]
    frames: int
    min_frames: int
    fps: float | None
    max_frames: int | None = None
    crop_seed: int = 0
    masks: MasksPlan | None = None
    image_to_video: float = 0.0
    decoder: str = ""

    @cached_property
    def captions(self) -> CaptionsFrom:
        """Where captions come from: as the table says, else the backend's own, else text files."""
        return self.table.captions or ("backend" if isinstance(self.backend, SupportsCaptions) else "textfile")


@dataclass(frozen=True)
class ValidationPlan:
    """[validation] with every default resolved. shape: what is generated. images: nickname -> the file with its first picture."""

    prompts: Mapping[str, str]
    negative_prompt: str
    shape: ClipShape
    fps: float
    guidance: float
    steps: int
    seed: int
    images: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The parts of a run, built and checked, and the values core resolved.

    base: storage type of the denoiser. processes: how many train together. regularizers: (name, part).
    warnings: what is allowed but probably not meant.
    """

    config: Config
    processes: int
    family: Family
    sampler: Sampler
    regularizers: tuple[tuple[str, Regularizer], ...]
    datasets: tuple[DatasetPlan, ...]
    base: DType
    validation: ValidationPlan | None
    warnings: tuple[str, ...]

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """Which part of each dataset an epoch takes: its weight by the largest."""
        # By what the file says: 0.1 is a tenth.
        weights = [Fraction(repr(dataset.table.weight)) for dataset in self.datasets]
        return tuple(weight / max(weights) for weight in weights)


@dataclass(frozen=True)
class DatasetSurvey:
    """What a scan found in one dataset.

    files: looked at, captions not counted. samples: clip shape -> number of training samples, repeats not counted.
    left_out: reason -> (number of files, an example's id), dropped and failed alike. clips: clip shape -> number of files
    that the samples are of; windows: -> number of windows, each encoded once; where either is empty, each sample has one.
    stretch: clip shape -> the most that a picture becomes wider or higher by being squeezed into it, at least 1; empty: none
    does. notes: what else is worth knowing, such as caption rows without a clip. share: the part of it that an epoch takes.
    """

    id: str
    files: int
    samples: Mapping[ClipShape, int]
    left_out: Mapping[str, tuple[int, str]]
    repeats: int
    clips: Mapping[ClipShape, int] = field(default_factory=dict)
    windows: Mapping[ClipShape, int] = field(default_factory=dict)
    stretch: Mapping[ClipShape, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    share: Fraction = Fraction(1)

    def clips_of(self, shape: ClipShape) -> int:
        """Files that give samples of a shape."""
        return self.clips.get(shape, 0) if self.clips else self.samples.get(shape, 0)

    def windows_of(self, shape: ClipShape) -> int:
        """Windows of a shape: what is encoded and cached."""
        return self.windows.get(shape, 0) if self.windows else self.samples.get(shape, 0)


@dataclass(frozen=True)
class Bucket:
    """What all datasets have of one shape.

    clips, windows: files, and windows to encode. samples: in an epoch, repeats counted. stretch: the most that a picture
    becomes wider or higher in it, at least 1.
    """

    shape: ClipShape
    clips: int
    windows: int
    samples: int
    stretch: float


@dataclass(frozen=True)
class Survey:
    """What a scan found in all datasets. texts: different captions to encode, of samples only."""

    datasets: tuple[DatasetSurvey, ...]
    texts: int

    def table(self) -> tuple[Bucket, ...]:
        """Every bucket, in order of shape."""
        return tuple(
            Bucket(
                shape,
                clips=sum(found.clips_of(shape) for found in self.datasets),
                windows=sum(found.windows_of(shape) for found in self.datasets),
                samples=round(samples),
                stretch=max(found.stretch.get(shape, 1.0) for found in self.datasets),
            )
            for shape, samples in sorted(self.buckets().items())
        )

    def buckets(self) -> dict[ClipShape, float]:
        """Samples of one epoch by clip shape, repeats and weights counted: whole unless a weight thins a dataset out."""
        total: dict[ClipShape, Fraction] = {}
        for dataset in self.datasets:
            for shape, count in dataset.samples.items():
                total[shape] = total.get(shape, Fraction(0)) + count * (1 + dataset.repeats) * dataset.share
        return {shape: _plain(count) for shape, count in total.items()}

    @property
    def epoch(self) -> float:
        """Samples in one epoch, repeats and weights counted, on average."""
        return sum(self.buckets().values())


def _plain(number: Fraction) -> float:
    """As whole as it is."""
    return number.numerator if number.denominator == 1 else float(number)
