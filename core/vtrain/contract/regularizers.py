"""What a regularizer must be, and what more it can be. As in protocols.py, abilities are found by isinstance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vtrain.contract.errors import Problem
from vtrain.contract.geometry import ClipShape, FeatureShape, TokenGrid
from vtrain.contract.protocols import DType, HashFile
from vtrain.contract.records import EncoderMemory, LossTerm, Needs, RunLength, StepView

if TYPE_CHECKING:
    from torch import Tensor, nn


class FeatureEncoder(Protocol):
    """A frozen encoder of pictures, of a regularizer. *torch*"""

    def encode(self, frames: Tensor, grid: TokenGrid) -> Tensor:
        """frames (B, 3, f, H, W) float in [-1, 1] -> features (B, f, h', w', D') on the same device, of `feature_shape`.

        grid: of the clips' tokens; its frames are those of `frames`.
        """
        ...


@runtime_checkable
class SupportsFeatures(Protocol):
    """A regularizer that reads features of the clean frames, from a frozen encoder of its own (Needs.features)."""

    @property
    def feature_dtype(self) -> DType:
        """Storage type of cached features."""
        ...

    def feature_shape(self, clip: ClipShape, grid: TokenGrid) -> FeatureShape:
        """Arithmetic only; equals what the encoder gives for a clip of that shape in pixels."""
        ...

    def feature_fingerprint(self, hash_file: HashFile) -> str:
        """Changes when, and only when, features would: weights, sizes, pooling, storage type."""
        ...

    def open_feature_encoder(self, device: str) -> AbstractContextManager[FeatureEncoder]:
        """*torch* Load the encoder for the length of a with block; its memory is free afterwards. Raises ModelError."""
        ...


@runtime_checkable
class SupportsFeatureMemory(Protocol):
    """A regularizer with features (SupportsFeatures) that knows what its encoder takes in memory."""

    def feature_memory(self, clips: int, clip: ClipShape, grid: TokenGrid) -> EncoderMemory | None:
        """Of the encoder with so many clips of this shape at once; None if it is not known, such as of weights yet to be fetched.

        weights: bytes, from files' headers. encode: measured; `encode.of(clip)` is what `encode` takes at its peak for all of them,
        features included and the frames that it is given not. No torch.
        """
        ...


@runtime_checkable
class SupportsCheck(Protocol):
    """A regularizer that can be wrong for a run, and says so in the plan."""

    def check(self, clips: Sequence[tuple[ClipShape, TokenGrid | None]]) -> Sequence[Problem]:
        """What stops the run: an encoder that is nowhere, clips too short. Problems need no `where`. Nothing is loaded.

        clips: the longest of each dataset's buckets, with their tokens if the family knows them (SupportsTokenGrid).
        """
        ...

    def warnings(self) -> Sequence[str]:
        """What of the options has no effect, and why."""
        ...


@runtime_checkable
class SupportsWeight(Protocol):
    """A regularizer whose weight at each step is known beforehand: `vtrain plan --plots` draws it."""

    def weight_at(self, step: int, run: RunLength) -> float:
        """What its loss is multiplied by at this step (optimizer steps done so far), whatever its own numbers will be. No torch."""
        ...


@runtime_checkable
class SupportsPauses(Protocol):
    """A loss module that is not always at work. Where it is not, it is not called, no tap is read for it, no teacher runs."""

    def active(self, step: int, run: RunLength) -> bool:
        """Whether it is called at this step (optimizer steps done so far). The same on every process; reads no device."""
        ...

    def over(self, step: int, run: RunLength) -> bool:
        """Whether `active` is false at this step whatever happens until then: nothing is prepared for it."""
        ...


@runtime_checkable
class SupportsFeedback(Protocol):
    """A loss module that goes by its own numbers, once they are read from the device."""

    def observe(self, step: int, metrics: Mapping[str, float], *, decide: bool) -> None:
        """Its metrics of an optimizer step, mean over all micro-batches and processes; steps come in order, on every process.

        step: 1-based. metrics: empty where it was not called. decide: whether conclusions may be drawn now. A step with
        `decide` is told before the next one starts, others later; so a resumed run concludes at the same steps.
        """
        ...


@runtime_checkable
class SupportsLearningRate(Protocol):
    """A loss module whose parameters are trained at a rate of their own."""

    @property
    def lr_factor(self) -> float:
        """Multiplies the optimizer's learning rate. Greater than 0."""
        ...


class LossModule(Protocol):
    """A regularizer at work: an nn.Module whose parameters, if any, are trained, saved and resumed. *torch*"""

    def __call__(self, view: StepView) -> LossTerm: ...


class Regularizer(Protocol):
    """A loss term beside the flow loss. It has never heard of a family."""

    def needs(self) -> Needs: ...

    def describe(self) -> Sequence[tuple[str, str]]:
        """(label, text) rows for the plan."""
        ...

    def load(self, tap_widths: Mapping[int, int]) -> nn.Module:
        """*torch* The LossModule. tap_widths: block number -> D."""
        ...
