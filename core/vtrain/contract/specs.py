"""What a plugin registers: hooks, the specs they return, the catalog of all of them, and finding one there by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pluggy

from vtrain.contract.backends import DataBackend
from vtrain.contract.captions import CaptionExtra
from vtrain.contract.errors import ConfigError, PluginError, Problem
from vtrain.contract.optimizers import OptimizedRun
from vtrain.contract.options import Options
from vtrain.contract.protocols import Family, Sampler, Tracker
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
    sampler_options: what the family's own recipe sets of that sampler's options, as a file would; they are its defaults for
    this family. What a file says beside it is taken, and the plan warns of it.
    caption_extras: what it reads of a clip beside its caption, known before it is built; it then has SupportsCaptionExtras.
    """

    kind: ClassVar[str] = "family"
    build: Callable[[Any], Family]
    sampler: str
    fixed_sampler: bool = False
    sampler_options: Mapping[str, object] = field(default_factory=dict)
    caption_extras: tuple[CaptionExtra, ...] = ()


@dataclass(frozen=True)
class SamplerSpec(Spec):
    """A noise schedule. build(options, scheduler config of the model folder) -> Sampler, without torch.

    timesteps_of: the family in whose unit its levels have timesteps, with which alone it works then. "": it gives sigma alone,
    and works with every family, which knows its own unit (Family.timestep).
    """

    kind: ClassVar[str] = "sampler"
    build: Callable[[Any, Mapping[str, object]], Sampler]
    timesteps_of: str = ""


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


Moved = Literal["fp32", "bf16", "sharded"]
"""Sorts of weights that an optimizer may move rightly."""


@dataclass(frozen=True)
class OptimizerSpec(Spec):
    """An optimizer. build(options, parameter groups) -> torch.optim.Optimizer, imports torch. options has a field `lr`.

    moves: the weights that it moves rightly. "bf16": with stochastic rounding, or what rounding takes kept in more than bf16;
    without, updates of the usual size are lost. "sharded": of which each process holds a part: each number's update depends on
    that number's own.
    state_bytes: bytes of state per trained parameter, for the plan; 0: it keeps none. Where options decide it, the most that they
    make it keep: with others it may keep less, or nothing. state_bytes_of: the same by type of weights ("bf16"), where it differs.
    What it keeps are tensors and numbers in optimizer.state[parameter], and numbers, flags and tensors on the CPU in its groups:
    a checkpoint holds these, and state_dict is not asked.
    eval_weights: whether it trains at other weights than those it is after (SupportsEvalWeights): a validation has both in memory.
    usual_lr: lowest and highest learning rate of usual training; beyond it the plan warns. sensible_lr: above it nothing is
    learned, which is an error. None: any.
    library: (module, requirement for pip) of what build imports beside torch, where the plugin's distribution does not depend on
    it: where it is not installed, the plan says so. advice(options, run): what of them does not go together; the plan warns of it.
    """

    kind: ClassVar[str] = "optimizer"
    build: Callable[[Any, Sequence[ParameterGroup]], torch.optim.Optimizer]
    moves: frozenset[Moved] = frozenset({"fp32"})
    state_bytes: float = 8.0
    usual_lr: tuple[float, float] | None = None
    sensible_lr: float | None = None
    state_bytes_of: Mapping[str, float] = field(default_factory=dict)
    library: tuple[str, str] | None = None
    advice: Callable[[Any, OptimizedRun], Sequence[str]] | None = None
    eval_weights: bool = False

    def bytes_of_state(self, weights: str) -> float:
        """Bytes of state per parameter of this type: "fp32" or "bf16"."""
        return self.state_bytes_of.get(weights, self.state_bytes)


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
            "caption_per",
            "caption_prefix",
            "captions_file",
            "file_column",
            "caption_column",
            "ignore_extras",
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


PROJECT = "vtrain"
API_VERSION = 1
ENTRY_POINT_GROUP = f"{PROJECT}.v{API_VERSION}"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """The hook specifications."""

    @hookspec
    def vtrain_families(self) -> Iterable[FamilySpec]:
        """Model families: text encoder, video codec and denoiser on a model folder."""
        return ()

    @hookspec
    def vtrain_regularizers(self) -> Iterable[RegularizerSpec]:
        """Loss terms beside the flow loss."""
        return ()

    @hookspec
    def vtrain_samplers(self) -> Iterable[SamplerSpec]:
        """Noise schedules, for training and sampling."""
        return ()

    @hookspec
    def vtrain_data_backends(self) -> Iterable[DataBackendSpec]:
        """Storages that hold datasets."""
        return ()

    @hookspec
    def vtrain_optimizers(self) -> Iterable[OptimizerSpec]:
        """Optimizers."""
        return ()

    @hookspec
    def vtrain_trackers(self) -> Iterable[TrackerSpec]:
        """Experiment trackers."""
        return ()


HOOK_SPECS: Mapping[str, type[Spec]] = {
    "vtrain_families": FamilySpec,
    "vtrain_regularizers": RegularizerSpec,
    "vtrain_samplers": SamplerSpec,
    "vtrain_data_backends": DataBackendSpec,
    "vtrain_optimizers": OptimizerSpec,
    "vtrain_trackers": TrackerSpec,
}


@dataclass(frozen=True)
class Registered:
    """A part and where it comes from."""

    spec: Spec
    entry_point: str
    distribution: str
    version: str


@dataclass(frozen=True)
class Failure:
    """A plugin, or a part of one, that cannot be used, and why.

    kind, name: the part it would have been, where known ("" otherwise).
    """

    entry_point: str
    distribution: str
    version: str
    reason: str
    kind: str = ""
    name: str = ""


@dataclass(frozen=True)
class Catalog:
    """Everything discovered. parts: (kind, name) -> part."""

    parts: Mapping[tuple[str, str], Registered]
    failures: tuple[Failure, ...]

    def find(self, kind: str, name: str) -> Registered | None:
        return self.parts.get((kind, name))

    def names(self, kind: str) -> tuple[str, ...]:
        return tuple(sorted(name for of, name in self.parts if of == kind))


NOUNS = {
    "family": ("family", "families"),
    "regularizer": ("regularizer", "regularizers"),
    "sampler": ("sampler", "samplers"),
    "data_backend": ("data backend", "data backends"),
    "optimizer": ("optimizer", "optimizers"),
    "tracker": ("tracker", "trackers"),
}
"""Kind -> its name in messages, one and many."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'Did you mean "steps"?', or "" when nothing known is like `word`."""
    # Of three letters two alike are not enough: "gpu" is not meant as "cpu".
    match = get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.6 if len(word) > 3 else 0.7)
    return f'Did you mean "{match[0]}"?' if match else ""


def listed(names: Iterable[str]) -> str:
    """Names as a list for a sentence; "none" when there are none."""
    return ", ".join(f'"{name}"' for name in sorted(names)) or "none"


def bytes_text(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def with_article(noun: str) -> str:
    """ "an optimizer", "a sampler"."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def ended(text: str) -> str:
    """A text as a sentence: with a full stop, if it ends in none and asks nothing."""
    return text if text.endswith((".", "?")) else f"{text}."


def origin(entry: Failure | Registered) -> str:
    """ "vtrain-toy 1.0" of a part or a failure."""
    return f"{entry.distribution} {entry.version}".strip() or "no distribution"


def part_or_error(catalog: Catalog, kind: str, name: str, where: str) -> Registered:
    """The part `name` of `kind`. where: the place that names it.

    Raises PluginError if a plugin would bring it and is broken, ConfigError if nothing installed is called so.
    """
    found = catalog.find(kind, name)
    if found is not None:
        return found
    noun = NOUNS[kind][0]
    own = [failure for failure in catalog.failures if (failure.kind, failure.name) == (kind, name)]
    own = own or [failure for failure in catalog.failures if not failure.kind and failure.entry_point == name]
    if own:
        raise PluginError(
            Problem(
                where,
                f'the {noun} "{name}" of {origin(failure)} cannot be used: {ended(failure.reason)}',
                _mend(failure),
            )
            for failure in own
        )
    raise ConfigError(Problem(where, f'no {noun} is called "{name}".', _alternatives(catalog, kind, name)))


def _mend(failure: Failure) -> str:
    return f"Fix or remove {failure.distribution}." if failure.distribution else ""


def _alternatives(catalog: Catalog, kind: str, name: str) -> str:
    """What a user may have meant: a similar name, a part of another kind, a plugin that could not be loaded."""
    hints = [did_you_mean(name, catalog.names(kind)), f"Installed {NOUNS[kind][1]}: {listed(catalog.names(kind))}."]
    hints += [f'"{name}" is {with_article(NOUNS[of][0])}.' for of, other in sorted(catalog.parts) if other == name]
    hints += [
        f'The plugin "{failure.entry_point}" of {origin(failure)} could not be loaded: {ended(failure.reason)}'
        for failure in catalog.failures
        if not failure.kind and failure.distribution
    ]
    return " ".join(hint for hint in hints if hint)
