"""The entry points of installed distributions, read without importing any of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions

from vtrain.contract import PROJECT, Failure

_GROUP = re.compile(rf"{PROJECT}\.v(\d+)")


@dataclass(frozen=True)
class Installed:
    """A plugin as its distribution declares it. api: the API version in the name of its entry-point group."""

    entry: EntryPoint
    api: int
    distribution: str
    version: str

    def failure(self, reason: str, kind: str = "", name: str = "") -> Failure:
        return Failure(self.entry.name, self.distribution, self.version, reason, kind, name)


def installed() -> tuple[list[Installed], list[Failure]]:
    """All plugins in order of name, and the distributions whose declaration cannot be read.

    A distribution found twice on the path (an editable install beside its source) counts once, as Python imports it.
    """
    plugins: list[Installed] = []
    failures: list[Failure] = []
    seen: set[str] = set()
    for distribution in _declaring():
        name, version = _identity(distribution)
        if (key := re.sub(r"[-_.]+", "-", name).lower()) in seen:
            continue
        seen.add(key)
        try:
            plugins += [
                Installed(entry, int(match[1]), name, version)
                for entry in distribution.entry_points
                if (match := _GROUP.fullmatch(entry.group))
            ]
        except Exception as error:
            failures.append(Failure("", name, version, f"its entry_points.txt cannot be read: {error}"))
    order = sorted(plugins, key=lambda plugin: (plugin.entry.name, plugin.api, plugin.distribution, plugin.entry.value))
    return order, failures


def _declaring() -> Iterator[Distribution]:
    """Distributions that declare something for vtrain. Metadata is parsed for these only: parsing all is slow."""
    for distribution in distributions():
        try:
            text = distribution.read_text("entry_points.txt")
        except (OSError, UnicodeDecodeError):
            continue  # not readable: nothing in it can be ours to name
        if text and re.search(rf"^\s*\[\s*{_GROUP.pattern}\s*\]", text, re.MULTILINE):
            yield distribution


def _identity(distribution: Distribution) -> tuple[str, str]:
    """Name and version; "unknown" where the metadata lacks them."""
    metadata = distribution.metadata
    name = metadata["Name"] if "Name" in metadata else None  # noqa: SIM401 - the protocol has no get
    version = metadata["Version"] if "Version" in metadata else None  # noqa: SIM401
    return name or "unknown", version or "unknown"
