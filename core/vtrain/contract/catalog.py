"""What is installed: the parts that registered, and the plugins that failed to, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vtrain.contract.specs import Spec


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
