"""What a family takes beside text: a first picture, a clip. What is given clean, what is encoded, what a draw lacks.

A condition reaches the denoiser in two ways, one of which may be missing. `clean_frames`: the first latent frames of the clip
itself are at level 0, and out of the loss. `encoder`: tensors made of the clip's pixels, cached once for each window, in
`Condition.extras` by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from vtrain.contract.errors import Problem
from vtrain.contract.geometry import ClipShape
from vtrain.contract.protocols import DType, Family, HashFile, SupportsFrameLevels

if TYPE_CHECKING:
    from torch import Tensor

ConditionSource = Literal["first_frame", "clip"]
"""What a condition is made of: the first frame of a window, or all of its frames."""

ConditionTensors = Mapping[str, tuple[tuple[int, ...], DType]]
"""Name of a tensor in `Condition.extras` -> (its shape for one clip, storage type)."""


class ConditionEncoder(Protocol):
    """Pixels to the tensors of one condition. *torch* One thread at a time."""

    def encode(self, pixels: Tensor, clip: ClipShape) -> Mapping[str, Tensor]:
        """The tensors that the spec declares for `clip`, B first, on the same device.

        pixels: (B, 3, F, H, W) float in [-1, 1]; of source "first_frame" F is 1, of "clip" it is clip.frames. clip: of the
        whole window, or of the video that is to be generated.
        """
        ...


@dataclass(frozen=True)
class ConditionEncoderSpec:
    """How a condition is encoded.

    tensors: a clip's shape -> what `ConditionEncoder.encode` gives; arithmetic only. fingerprint: changes when, and only when,
    these numbers would: weights, config, storage type. open: *torch* load the encoder on a device for the length of a with
    block; its memory is free afterwards; raises ModelError. check: what is wrong with its files; asked only if the run uses it;
    nothing is loaded.
    """

    tensors: Callable[[ClipShape], ConditionTensors]
    fingerprint: Callable[[HashFile], str]
    open: Callable[[str], AbstractContextManager[ConditionEncoder]]
    check: Callable[[], Sequence[Problem]] = tuple


@dataclass(frozen=True)
class ConditionSpec:
    """One condition. name: unique in the family; summary: a few words, such as "the first picture".

    required: the denoiser cannot do without it: every draw has it, and every validation prompt needs a picture. If not, the
    dataset's share (data.video.image_to_video) decides, and the tensors of a draw without it are zeros. All that are not required
    are drawn together. Tensors reach the denoiser in their storage type, at every call.
    clean_frames: latent frames, from the first on, that are given clean: they are at level 0 and out of the loss, and in
    validation they stay as they are. It needs SupportsFrameLevels; of a single first frame, at most one.
    encoder: None: nothing is encoded, the clean frames are all.
    With guidance both sides are given the same; a dropped caption drops no condition.
    """

    name: str
    summary: str
    source: ConditionSource
    required: bool
    clean_frames: int
    encoder: ConditionEncoderSpec | None = None

    @property
    def latent_frames(self) -> int:
        """Of the shortest clip with which it makes sense: after what is given something is left to be made."""
        return max(self.clean_frames + 1, 2 if self.source == "first_frame" else 1)


@runtime_checkable
class SupportsConditions(Protocol):
    """A family that takes more than text."""

    def conditions(self) -> tuple[ConditionSpec, ...]:
        """The same each time. The names of all their tensors are unique."""
        ...


def takes_frame_levels(family: Family) -> bool:
    """Whether the family's denoiser takes a level for each latent frame, in which clean frames can stand among noisy ones."""
    return isinstance(family, SupportsFrameLevels) and family.frame_levels


def conditions_of(family: Family) -> tuple[ConditionSpec, ...]:
    """All that a family declares; none of one that takes text alone."""
    return tuple(family.conditions()) if isinstance(family, SupportsConditions) else ()


def tensors_of(conditions: Sequence[ConditionSpec], clip: ClipShape) -> dict[str, tuple[tuple[int, ...], DType]]:
    """Every tensor of `Condition.extras` for clips of one shape, as the specs declare them."""
    return {
        name: (tuple(shape), dtype)
        for spec in conditions
        if spec.encoder is not None
        for name, (shape, dtype) in spec.encoder.tensors(clip).items()
    }
