"""A plan: what a run will do, decided before anything heavy is loaded. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Literal

from vtrain.config.data_tables import DataTable
from vtrain.config.record import Config
from vtrain.contract import (
    Caption,
    CaptionExtra,
    ClipShape,
    ConditionSpec,
    DataBackend,
    DType,
    Family,
    Regularizer,
    Role,
    Sampler,
    Size,
    SupportsCaptions,
    conditions_of,
)
from vtrain.contract.precision import STORAGE, StorageName, StorageType
from vtrain.contract.rooms import Room
from vtrain.plan.precision import loaded_in

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
    that have the family's conditions that are not required, from 0 to 1; 1 where all are required.
    decoder: "" for PyAV, else the name and version of what decodes instead, as they stand in the keys of entries.
    extras: those that the family reads of its clips; foreign_extras: those that other installed families read -> one of them.
    Neither has those of data.ignore_extras. use: the backend's name.
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
    extras: tuple[CaptionExtra, ...] = ()
    foreign_extras: Mapping[str, str] = field(default_factory=dict)
    use: str = ""

    def has(self, condition: ConditionSpec) -> bool:
        """Whether some of its draws have the condition."""
        return condition.required or self.image_to_video > 0

    @cached_property
    def captions(self) -> CaptionsFrom:
        """Where captions come from: as the table says, else the backend's own, else text files."""
        return self.table.captions or ("backend" if isinstance(self.backend, SupportsCaptions) else "textfile")


@dataclass(frozen=True)
class ValidationPlan:
    """[validation] with every default resolved. shape: what is generated. size: to which that is resized, its own or another.
    images: nickname -> the file with its first picture."""

    prompts: Mapping[str, str]
    negative_prompt: str
    shape: ClipShape
    size: Size
    fps: float
    guidance: float
    steps: int
    seed: int
    images: Mapping[str, Path] = field(default_factory=dict)

    @property
    def texts(self) -> tuple[tuple[str, Caption, Role], ...]:
        """(key in the table, what is encoded for it, its role): prompts, and with guidance the negative one."""
        prompts: list[tuple[str, Caption, Role]] = [
            (f"prompts.{nickname}", Caption(prompt), "prompt") for nickname, prompt in self.prompts.items()
        ]
        if self.guidance > 1:
            prompts.append(("negative_prompt", Caption(self.negative_prompt), "negative"))
        return tuple(prompts)


def encoded(
    conditions: Sequence[ConditionSpec], datasets: Sequence[DatasetPlan], *, pictures: bool
) -> tuple[ConditionSpec, ...]:
    """Those with an encoder that are used: in training, or with `pictures`, of validation."""
    return tuple(
        each for each in conditions if each.encoder is not None and (pictures or any(d.has(each) for d in datasets))
    )


@dataclass(frozen=True)
class MemoryChoice:
    """What a plan chose. limit: bytes that the process may take; where: whose they are. words: the settings chosen, () for none
    beside those of the file. time: of a step by that of the fastest set. faster: sets that would be faster, and what they take.
    host: bytes of main memory beside a card that it may take; None: not known. amount: bytes that it takes. on_cpu: whether
    the CPU trains, and all this is of the machine's memory. room: what was found there. kept: whether it is chosen because the run
    that resumes was begun with it.
    """

    limit: int
    where: str
    host: int | None
    words: tuple[str, ...]
    time: float
    faster: tuple[tuple[tuple[str, ...], int], ...]
    amount: int = 0
    on_cpu: bool = False
    room: Room = field(default_factory=Room)
    kept: bool = False


@dataclass(frozen=True)
class Plan:
    """The parts of a run, built and checked, and the values core resolved.

    base: storage type of the denoiser. processes: how many train together. regularizers: (name, part).
    warnings: what is allowed but probably not meant. memory: what [memory] made it choose, which `config` has; None without it.
    """

    config: Config
    processes: int
    family: Family
    sampler: Sampler
    regularizers: tuple[tuple[str, Regularizer], ...]
    datasets: tuple[DatasetPlan, ...]
    base: StorageName
    validation: ValidationPlan | None
    warnings: tuple[str, ...]
    memory: MemoryChoice | None = None

    @cached_property
    def conditions(self) -> tuple[ConditionSpec, ...]:
        """All that the family takes beside text."""
        return conditions_of(self.family)

    @cached_property
    def encoded(self) -> tuple[ConditionSpec, ...]:
        """Those of them with an encoder that the run uses: in training, or for a validation picture."""
        pictures = self.validation is not None and bool(self.validation.images)
        return encoded(self.conditions, self.datasets, pictures=pictures)

    @property
    def storage(self) -> StorageType:
        """What `base` names."""
        return STORAGE[self.base]

    @property
    def loaded(self) -> DType:
        """The type in which the denoiser's weights are read: what is quantised is read in bf16, and its other weights stay so."""
        return loaded_in(self.base)

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """Which part of each dataset an epoch takes: its weight by the largest."""
        # By what the file says: 0.1 is a tenth.
        weights = [Fraction(repr(dataset.table.weight)) for dataset in self.datasets]
        return tuple(weight / max(weights) for weight in weights)
