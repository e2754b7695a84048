"""A family's text: whether encoders and caption extras are declared as the contract says, their names, their fingerprints."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import get_args

from vtrain.contract import (
    Catalog,
    DType,
    Family,
    FamilySpec,
    HashFile,
    SupportsCaptionExtras,
    TextEncoderSpec,
    TextPartSpec,
)
from vtrain.contract.specs import listed
from vtrain.contract.text import Padding
from vtrain.plan.records import DatasetPlan
from vtrain.registry.blame import PartFault

_MOST = 3


def check_text(family: Family) -> None:
    """Raises PartFault with all that is wrong with the declaration."""
    encoders: object = family.text_encoders()
    if not isinstance(encoders, Mapping) or not all(isinstance(each, TextEncoderSpec) for each in encoders.values()):
        raise PartFault("family", "", f"its text_encoders gave {encoders!r}, not TextEncoderSpecs by name")
    faults = []
    if not 1 <= len(encoders) <= _MOST:
        faults.append(f"it has {len(encoders)} text encoders; it needs 1 to {_MOST}")
    owners: dict[str, str] = {}
    for name, encoder in encoders.items():
        faults += [f'the text encoder "{name}" {fault}' for fault in _faults(encoder, owners)]
        owners |= dict.fromkeys(encoder.parts, name)
    if faults:
        raise PartFault("family", "", faults)


def _faults(encoder: TextEncoderSpec, owners: Mapping[str, str]) -> Iterator[str]:
    """owners: part -> encoder, of those before it."""
    if not encoder.parts:
        yield "declares no part"
    for name, part in encoder.parts.items():
        if name in owners:
            yield f'gives a part "{name}", as the text encoder "{owners[name]}" does'
        yield from (f'declares the part "{name}" with {odd}' for odd in _odd(part))


def _odd(part: TextPartSpec) -> Iterator[str]:
    if part.width < 1:
        yield f"width = {part.width}"
    if part.tokens is not None and part.tokens < 1:
        yield f"tokens = {part.tokens}"
    if part.padding not in get_args(Padding):
        yield f'padding = "{part.padding}"'
    elif part.padding == "full" and part.tokens is None:
        yield 'padding = "full", which a pooled vector cannot have'
    if part.dtype not in get_args(DType):
        yield f'dtype = "{part.dtype}"'


def stage_names(encoders: Collection[str]) -> dict[str, str]:
    """Encoder -> what it is called in progress and in what a run records: "text"; of several "text (name)"."""
    return {name: "text" if len(encoders) == 1 else f"text ({name})" for name in encoders}


def text_fingerprints(family: Family, hash_file: HashFile) -> dict[str, str]:
    """Encoder -> its fingerprint. Raises ModelError, and PartFault if two are the same: their entries would be too."""
    found = {name: encoder.fingerprint(hash_file) for name, encoder in family.text_encoders().items()}
    for name, mark in found.items():
        if same := next((other for other, its in found.items() if other != name and its == mark), None):
            raise PartFault("family", "", f'the text encoders "{name}" and "{same}" have the same fingerprint')
    return found


def text_marks(family: Family, hash_file: HashFile) -> dict[str, str]:
    """The same by their `stage_names`. Raises ModelError, PartFault."""
    found = text_fingerprints(family, hash_file)
    names = stage_names(found)
    return {names[name]: mark for name, mark in found.items()}


def with_extras(dataset: DatasetPlan, family: Family, foreign: Mapping[str, str]) -> DatasetPlan:
    """The dataset with the caption extras that are read of it. foreign: as `foreign_extras` gives it."""
    ignored = dataset.table.ignore_extras
    own = family.caption_extras if isinstance(family, SupportsCaptionExtras) else ()
    return replace(
        dataset,
        extras=tuple(extra for extra in own if extra.name not in ignored),
        foreign_extras={name: reader for name, reader in foreign.items() if name not in ignored},
    )


def foreign_extras(spec: FamilySpec, family: Family, catalog: Catalog | None) -> dict[str, str]:
    """Caption extras that this family does not read, and another installed one does -> its name. catalog: None for none.

    Raises PartFault where the family, once built, reads others than its spec says.
    """
    own = family.caption_extras if isinstance(family, SupportsCaptionExtras) else ()
    if [replace(extra, default="") for extra in own] != [replace(extra, default="") for extra in spec.caption_extras]:
        what = f"its spec declares the caption extras {listed(extra.name for extra in spec.caption_extras)}, and the family "
        what += listed(extra.name for extra in own)
        raise PartFault("family", "", what, "FamilySpec.caption_extras and caption_extras have to be the same.")
    parts = [part.spec for (kind, _), part in sorted(catalog.parts.items()) if kind == "family"] if catalog else []
    names = {extra.name for extra in own}
    return {
        extra.name: each.name
        for each in parts
        if isinstance(each, FamilySpec)
        for extra in each.caption_extras
        if extra.name not in names
    }
