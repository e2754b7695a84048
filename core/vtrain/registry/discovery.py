"""Every installed plugin to one catalog. Nothing a plugin does wrong ends discovery: it becomes a row with its reason."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout

from vtrain.contract import API_VERSION, Catalog, Failure, Registered
from vtrain.contract.lookup import did_you_mean, origin
from vtrain.registry.hooks import registrations
from vtrain.registry.installed import Installed, installed

ALLOW = "VTRAIN_PLUGINS"
"""Environment variable: names of the entry points that may be used, with commas; unset: all, empty: none."""


def discover(allow: Sequence[str] | None = None) -> Catalog:
    """All parts of all installed plugins. allow: entry points that may be used; None: as VTRAIN_PLUGINS says.

    Plugins that are not allowed, or speak another API version, are reported without being imported. What plugins
    print while they are imported goes to stderr, so that stdout stays the command's own.
    """
    names = _allowed() if allow is None else list(allow)
    plugins, failures = installed()
    parts: list[Registered] = []
    for plugin in plugins:
        refusal = _refusal(plugin, names)
        found, failed = ([], [plugin.failure(refusal)]) if refusal else _load(plugin)
        parts += found
        failures += failed
    known = [plugin.entry.name for plugin in plugins]
    failures += [_unknown(name, known) for name in sorted(set(names or ())) if name not in known]
    unique, duplicates = _unique(parts)
    rows = sorted(
        failures + duplicates, key=lambda row: (row.entry_point, row.distribution, row.kind, row.name, row.reason)
    )
    return Catalog(unique, tuple(rows))


def _allowed() -> list[str] | None:
    value = os.environ.get(ALLOW)
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def _refusal(plugin: Installed, allow: Sequence[str] | None) -> str:
    """Why a plugin must not be imported; "" if it may."""
    if allow is not None and plugin.entry.name not in allow:
        return f"not in {ALLOW}"
    if plugin.api != API_VERSION:
        return f"it is written for version {plugin.api} of the plugin API; this vtrain speaks version {API_VERSION}"
    return ""


def _load(plugin: Installed) -> tuple[list[Registered], list[Failure]]:
    """Import one plugin and ask it what it registers."""
    try:
        with redirect_stdout(sys.stderr):
            loaded = plugin.entry.load()
            return registrations(plugin, loaded)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module that calls sys.exit() breaks itself only
        return [], [plugin.failure(_described(error, plugin.entry.module))]


def _described(error: BaseException, module: str) -> str:
    """ "ImportError: no module named x (toy/plugin.py:3)": type, message and the plugin's own deepest line."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    if isinstance(error, SyntaxError):  # its message has the place already
        return text
    package = module.split(".")[0]
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__", "")).split(".")[0] == package:
            place = f" ({frame.f_code.co_filename}:{line})"
    return text + place


def _unknown(name: str, known: Sequence[str]) -> Failure:
    hint = did_you_mean(name, known)
    return Failure(name, "", "", f"named in {ALLOW}, but no such plugin is installed" + (f". {hint}" if hint else ""))


def _unique(parts: Sequence[Registered]) -> tuple[dict[tuple[str, str], Registered], list[Failure]]:
    """Parts by (kind, name). A name that is registered twice is nobody's: choosing one would be a guess."""
    groups: dict[tuple[str, str], list[Registered]] = {}
    for part in parts:
        groups.setdefault((part.spec.kind, part.spec.name), []).append(part)
    failures = [_duplicate(part, group) for group in groups.values() if len(group) > 1 for part in group]
    return {key: groups[key][0] for key in sorted(groups) if len(groups[key]) == 1}, failures


def _duplicate(part: Registered, group: Sequence[Registered]) -> Failure:
    others = [f'"{other.entry_point}" of {origin(other)}' for other in group if other is not part]
    reason = f"the name is registered more than once: also by {', '.join(others)}"
    return Failure(part.entry_point, part.distribution, part.version, reason, part.spec.kind, part.spec.name)
