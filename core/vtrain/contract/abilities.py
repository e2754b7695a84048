"""What each part must have and what more it can have, by name; what a part lacks; and names that look like a misspelt ability.

Abilities are found by isinstance: one misspelt is one that the part does not have, without a word. So names are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

from vtrain.contract import adapters, backends, captions, conditions, optimizers, pipelines, protocols, regularizers
from vtrain.contract.specs import listed


@dataclass(frozen=True)
class Abilities:
    """The protocols of one sort of part. must: the one it is. can: those that it may be beside."""

    must: type
    can: tuple[type, ...]


ABILITIES: Mapping[str, Abilities] = {
    "family": Abilities(
        protocols.Family,
        (
            captions.SupportsWording,
            captions.SupportsCaptionExtras,
            captions.SupportsTokenCounts,
            protocols.SupportsTokenGrid,
            protocols.SupportsFrameLevels,
            protocols.SupportsBlockMemory,
            protocols.SupportsBlockWeights,
            protocols.SupportsEncoderMemory,
            conditions.SupportsConditions,
            adapters.SupportsAdapterNames,
            pipelines.SupportsReference,
        ),
    ),
    "text encoder": Abilities(protocols.TextEncoder, ()),
    "video codec": Abilities(protocols.VideoCodec, (protocols.SupportsDecoderOnly,)),
    "condition encoder": Abilities(conditions.ConditionEncoder, ()),
    "denoiser": Abilities(
        protocols.Denoiser,
        (
            protocols.SupportsLora,
            protocols.SupportsOriginalNames,
            protocols.SupportsDecayRule,
            protocols.SupportsFeedForward,
        ),
    ),
    "sampler": Abilities(
        protocols.Sampler, (protocols.SupportsStepwise, protocols.SupportsStepCheck, protocols.SupportsRollout)
    ),
    "regularizer": Abilities(
        regularizers.Regularizer,
        (
            regularizers.SupportsFeatures,
            regularizers.SupportsFeatureMemory,
            regularizers.SupportsCheck,
            regularizers.SupportsWeight,
        ),
    ),
    "feature encoder": Abilities(regularizers.FeatureEncoder, ()),
    "loss module": Abilities(
        regularizers.LossModule,
        (regularizers.SupportsPauses, regularizers.SupportsFeedback, regularizers.SupportsLearningRate),
    ),
    "optimizer": Abilities(optimizers.Optimizer, (optimizers.SupportsEvalWeights,)),
    "data backend": Abilities(
        backends.DataBackend, (backends.SupportsShards, backends.SupportsCaptions, backends.SupportsFiles)
    ),
    "tracker": Abilities(protocols.Tracker, (protocols.SupportsWarnings,)),
}
"""Every sort of part whose members are found by name -> its protocols."""

_ALIKE, _SHORTEST = 0.85, 6
"""How much alike two names are that mean the same, of 1; letters of the shortest name that is compared: "file" has many like it."""

_NOT_ITS_OWN = frozenset({"builtins", "typing", "abc", "enum", "collections", "contextlib", "torch", "pydantic"})
"""Packages whose classes a part may be made from: their names are no member that an author spelt."""


@dataclass(frozen=True)
class Misspelt:
    """name: what a part has. meant: the member that it looks like, which the part lacks. ability: its protocol."""

    name: str
    meant: str
    ability: str


_MODULE = frozenset({"forward", "named_parameters", "state_dict", "to"})
"""What tells an nn.Module, which a loss module is, without torch."""


def lacking(sort: str, part: object) -> str:
    """ "None", "the class Toy, not an object" or 'Toy, which lacks "draw"', for a part that is none; "" for one that is.

    sort: a key of ABILITIES. No property is read.
    """
    if part is None:
        return "None"
    if isinstance(part, type):
        return f"the class {part.__name__}, not an object"
    wanted = members(ABILITIES[sort].must) | (_MODULE if sort == "loss module" else frozenset())
    there = set(dir(part))
    missing = [name for name in wanted - there if not hasattr(part, name)]  # which asks __getattr__ alone
    return f"{type(part).__name__}, which lacks {listed(missing)}" if missing else ""


def misspelt(sort: str, names: Collection[str]) -> Iterator[Misspelt]:
    """Of a part with these public names. sort: a key of ABILITIES."""
    known = ABILITIES[sort]
    optional = {name: ability.__name__ for ability in known.can for name in members(ability)}
    absent = [name for name in sorted(optional) if name not in names and len(name) >= _SHORTEST]
    for name in sorted(set(names) - members(known.must) - optional.keys()):
        for meant in get_close_matches(name.lower(), absent, n=1, cutoff=_ALIKE):
            yield Misspelt(name, meant, optional[meant])


def halves(sort: str, names: Collection[str]) -> Iterator[tuple[str, frozenset[str], frozenset[str]]]:
    """(ability, its members that are there, those that are not) where most are: the part is none, without a word, for the others.

    sort, names: as `misspelt` takes them. Of an ability of two members one alone may be a part's own.
    """
    for ability in ABILITIES[sort].can:
        wanted = members(ability) - members(ABILITIES[sort].must)
        there = wanted.intersection(names)
        if len(wanted) / 2 < len(there) < len(wanted):
            yield ability.__name__, there, wanted - there


@cache
def members(protocol: type) -> frozenset[str]:
    """Names of a protocol's members."""
    return frozenset(_public(name for each in protocol.__mro__ for name in _named_in(each)))


def names_of(part: object) -> set[str]:
    """Public names that a part, or a class of parts, has of its own: without those of torch's modules and the like."""
    classes = part.__mro__ if isinstance(part, type) else type(part).__mro__
    foreign = {
        name for each in classes if each.__module__.partition(".")[0] in _NOT_ITS_OWN for name in _named_in(each)
    }
    return _public(dir(part)) - foreign


def _named_in(class_: type) -> Iterator[str]:
    yield from vars(class_)
    yield from vars(class_).get("__annotations__", ())


def _public(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}
