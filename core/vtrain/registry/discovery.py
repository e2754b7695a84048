"""Entry points to a catalog: plugins found, imported, asked; what fails is a row in it."""

from __future__ import annotations

import faulthandler
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions

import pluggy

from vtrain.contract import (
    API_VERSION,
    HOOK_SPECS,
    PROJECT,
    Catalog,
    Failure,
    Hooks,
    Registered,
    Spec,
)
from vtrain.contract.plugin_rules import hooks_are_spelt_right, line_of, returned, said
from vtrain.contract.spec_rules import NEEDED
from vtrain.contract.specs import did_you_mean, origin
from vtrain.registry.guard import in_time, stdout_on_stderr
from vtrain.registry.trials import BEGUN, CAME_THROUGH, faults, limit_s


def fault_of(spec: Spec) -> str:
    """What is wrong with a spec, in one sentence; "" if nothing is. A spec's fields are not trusted to be of their types."""
    found = next((problem for rule in NEEDED for problem in rule(spec, {})), None)
    return found.what.removesuffix(".") if found else ""


Result = tuple[list[Registered], list[Failure]]


def registrations(plugin: Installed, loaded: object) -> Result:
    """What `loaded`, the object of the entry point, registers.

    Each plugin has a pluggy manager of its own, so that none can see or break another. A misspelt hook fails the
    whole plugin; one bad part fails alone. Raises what the plugin's own code raises.
    """
    if faults := [problem.what.removesuffix(".") for problem in hooks_are_spelt_right(loaded)]:
        return [], [plugin.failure(fault) for fault in faults]
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    try:
        manager.register(loaded, name=plugin.entry.name)
    except pluggy.PluginValidationError as error:
        return [], [plugin.failure("a registration hook takes no arguments: " + " ".join(str(error).split()))]
    parts: list[Registered] = []
    failures: list[Failure] = []
    for implementation in manager.get_hookcallers(loaded) or ():
        found, failed = _from_hook(plugin, implementation.name, implementation.get_hookimpls())
        parts += found
        failures += failed
    return parts, failures or ([] if parts else [plugin.failure("it registers nothing")])


def _from_hook(plugin: Installed, hook: str, implementations: Sequence[pluggy.HookImpl]) -> Result:
    expected = HOOK_SPECS[hook]
    parts: list[Registered] = []
    failures: list[Failure] = []
    for implementation in implementations:
        if implementation.wrapper or implementation.hookwrapper:
            failures.append(
                plugin.failure(f"{hook} is a wrapper; a registration hook only returns specs", expected.kind)
            )
            continue
        specs, others = returned(hook, implementation.function)
        failures += [plugin.failure(other, expected.kind) for other in others]
        for item in specs:
            if fault := fault_of(item):
                failures.append(plugin.failure(fault, item.kind, str(item.name)))
            else:
                parts.append(Registered(item, plugin.entry.name, plugin.distribution, plugin.version))
    return parts, failures


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
        if (key := canonical(name)) in seen:
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


def canonical(distribution: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


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


ALLOW = "VTRAIN_PLUGINS"
"""Environment variable: names of the entry points that may be used, with commas; unset: all, empty: none."""


def discover(allow: Sequence[str] | None = None) -> Catalog:
    """All parts of all installed plugins. allow: entry points that may be used; None: as VTRAIN_PLUGINS says.

    Plugins that are not allowed, or speak another API version, are reported without being imported; so are those whose
    import hangs, ends or crashes the process that tries it. What plugins print while they are imported goes to stderr,
    so that stdout stays the command's own. Raises ConfigError if VTRAIN_PLUGIN_TIMEOUT is no number.
    """
    names = allowed() if allow is None else list(allow)
    plugins, failures = installed()
    refusals = [refusal_of(plugin, names) for plugin in plugins]
    tried = iter(faults([plugin for plugin, refusal in zip(plugins, refusals, strict=True) if not refusal]))
    parts: list[Registered] = []
    for plugin, refusal in zip(plugins, refusals, strict=True):
        fault = refusal or next(tried)
        found, failed = ([], [plugin.failure(fault)]) if fault else _load(plugin, limit_s())
        parts += found
        failures += failed
    known = [plugin.entry.name for plugin in plugins]
    failures += [_unknown(name, known) for name in sorted(set(names or ())) if name not in known]
    unique, duplicates = _unique(parts)
    rows = sorted(
        failures + duplicates, key=lambda row: (row.entry_point, row.distribution, row.kind, row.name, row.reason)
    )
    return Catalog(unique, tuple(rows))


def allowed() -> list[str] | None:
    """Entry points that may be used, as VTRAIN_PLUGINS says; None: all."""
    value = os.environ.get(ALLOW)
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def refusal_of(plugin: Installed, allow: Sequence[str] | None) -> str:
    """Why a plugin must not be imported; "" if it may."""
    if allow is not None and plugin.entry.name not in allow:
        return f"not in {ALLOW}"
    if plugin.api != API_VERSION:
        return f"it is written for version {plugin.api} of the plugin API; this vtrain speaks version {API_VERSION}"
    return ""


def trial(name: str, value: str, group: str, distribution: str, version: str, limit: str) -> None:
    """What a process that tries a plugin does: what `discover` does with it, and say that this was survived.

    Then Python ends as it always does, so that a thread which keeps it from ending is noticed too. limit: seconds after
    which the process is killed; it ends itself a little later where nobody is left to kill it.
    """
    faulthandler.dump_traceback_later(float(limit) + 10, exit=True)
    os.write(1, BEGUN)
    _load(Installed(EntryPoint(name, value, group), API_VERSION, distribution, version), 0.0)
    os.write(1, CAME_THROUGH)


def _load(plugin: Installed, limit: float) -> tuple[list[Registered], list[Failure]]:
    """Import one plugin and ask it what it registers, in `limit` seconds; 0: however long it takes."""
    try:
        with stdout_on_stderr(), in_time(limit):
            loaded = plugin.entry.load()
            return registrations(plugin, loaded)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module that calls sys.exit() breaks itself only
        return [], [plugin.failure(described(error, plugin.entry.module))]


def described(error: BaseException, module: str) -> str:
    """ "ImportError: no module named x (toy/plugin.py:3)": type, message and the plugin's own deepest line."""
    place = "" if isinstance(error, SyntaxError) else line_of(error, module)  # its message has the place already
    return f"{said(error)} ({place})" if place else said(error)


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
