"""What a plugin registers: frozen descriptions. A spec says what a part is called, what it takes and how it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vtrain.contract.options import Options
from vtrain.contract.protocols import DataBackend, Family, Sampler, Tracker
from vtrain.contract.records import ParameterGroup
from vtrain.contract.regularizers import Regularizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Spec:
    """Base of the six. name: lower case letters, digits, "-" and "_"; summary: one line; options: what its table takes.

    `build` may import heavy modules only inside its body, and only where the kind's docstring says so.
    """

    kind: ClassVar[str]
    name: str
    summary: str
    options: type[Options]


@dataclass(frozen=True)
class FamilySpec(Spec):
    """A model family. build(options) -> Family, without torch.

    sampler: the sampler it trains with unless [sampler] names another. fixed_sampler: whether another is an error.
    """

    kind: ClassVar[str] = "family"
    build: Callable[[Any], Family]
    sampler: str
    fixed_sampler: bool = False


@dataclass(frozen=True)
class SamplerSpec(Spec):
    """A noise schedule. build(options, scheduler config of the model folder) -> Sampler, without torch."""

    kind: ClassVar[str] = "sampler"
    build: Callable[[Any, Mapping[str, object]], Sampler]


@dataclass(frozen=True)
class RegularizerSpec(Spec):
    """A loss term. build(options) -> Regularizer, without torch."""

    kind: ClassVar[str] = "regularizer"
    build: Callable[[Any], Regularizer]


@dataclass(frozen=True)
class DataBackendSpec(Spec):
    """A storage. build(options) -> DataBackend, without torch."""

    kind: ClassVar[str] = "data_backend"
    build: Callable[[Any], DataBackend]


@dataclass(frozen=True)
class OptimizerSpec(Spec):
    """An optimizer. build(options, parameter groups) -> torch.optim.Optimizer, imports torch. options has a field `lr`.

    pure_bf16: whether it moves bf16 weights rightly (stochastic rounding, Kahan summation).
    state_bytes: bytes of state per trained parameter, for the plan.
    """

    kind: ClassVar[str] = "optimizer"
    build: Callable[[Any, Sequence[ParameterGroup]], torch.optim.Optimizer]
    pure_bf16: bool = False
    state_bytes: float = 8.0


@dataclass(frozen=True)
class TrackerSpec(Spec):
    """A tracker. build(options) -> Tracker, without heavy imports; those wait for Tracker.start."""

    kind: ClassVar[str] = "tracker"
    build: Callable[[Any], Tracker]


KINDS: tuple[type[Spec], ...] = (
    FamilySpec,
    RegularizerSpec,
    SamplerSpec,
    DataBackendSpec,
    OptimizerSpec,
    TrackerSpec,
)

RESERVED_KEYS: Mapping[str, frozenset[str]] = {
    "family": frozenset({"use", "train", "lora"}),
    "data_backend": frozenset(
        {
            "use",
            "id",
            "enabled",
            "captions",
            "caption",
            "caption_prefix",
            "captions_file",
            "file_column",
            "caption_column",
            "missing_caption",
            "resolution",
            "resolution_type",
            "crop",
            "min_size",
            "max_size",
            "downsample_to",
            "upscale",
            "repeats",
            "weight",
            "on_bad_file",
            "images",
            "decode_timeout",
            "decoder",
            "quarantine",
        }
        | {"video", "masks"}
    ),
    "regularizer": frozenset({"use"}),
    "sampler": frozenset({"use"}),
    "optimizer": frozenset({"use"}),
    "tracker": frozenset({"use"}),
}
"""Kind -> core's own keys of the tables that name a part of it: no option may be called so."""
