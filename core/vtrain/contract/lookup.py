"""Finding a part by its name, and saying what is there when it is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from vtrain.contract.catalog import Catalog, Failure, Registered
from vtrain.contract.errors import ConfigError, PluginError, Problem

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
    match = get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.6)
    return f'Did you mean "{match[0]}"?' if match else ""


def listed(names: Iterable[str]) -> str:
    """Names as a list for a sentence; "none" when there are none."""
    return ", ".join(f'"{name}"' for name in sorted(names)) or "none"


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
                where, f'the {noun} "{name}" of {origin(failure)} cannot be used: {failure.reason}.', _mend(failure)
            )
            for failure in own
        )
    raise ConfigError(Problem(where, f'no {noun} is called "{name}".', _alternatives(catalog, kind, name)))


def _mend(failure: Failure) -> str:
    return f"Mend or remove {failure.distribution}." if failure.distribution else ""


def _alternatives(catalog: Catalog, kind: str, name: str) -> str:
    """What a user may have meant: a similar name, a part of another kind, a plugin that could not be loaded."""
    hints = [did_you_mean(name, catalog.names(kind)), f"Installed {NOUNS[kind][1]}: {listed(catalog.names(kind))}."]
    hints += [f'"{name}" is a {NOUNS[of][0]}.' for of, other in sorted(catalog.parts) if other == name]
    hints += [
        f'The plugin "{failure.entry_point}" of {origin(failure)} could not be loaded: {failure.reason}.'
        for failure in catalog.failures
        if not failure.kind and failure.distribution
    ]
    return " ".join(hint for hint in hints if hint)
