"""One plugin's hooks, called once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import pluggy

from vtrain.contract import HOOK_SPECS, PROJECT, Failure, Hooks, Registered, Spec
from vtrain.contract.lookup import did_you_mean, listed
from vtrain.registry.installed import Installed
from vtrain.registry.items import fault_of

Result = tuple[list[Registered], list[Failure]]


def registrations(plugin: Installed, loaded: object) -> Result:
    """What `loaded`, the object of the entry point, registers.

    Each plugin has a pluggy manager of its own, so that none can see or break another. A misspelt hook fails the
    whole plugin; one bad part fails alone. Raises what the plugin's own code raises.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    try:
        manager.register(loaded, name=plugin.entry.name)
    except pluggy.PluginValidationError as error:
        return [], [plugin.failure("a registration hook takes no arguments: " + " ".join(str(error).split()))]
    if faults := _misspelt(manager, loaded):
        return [], [plugin.failure(fault) for fault in faults]
    parts: list[Registered] = []
    failures: list[Failure] = []
    for implementation in manager.get_hookcallers(loaded) or ():
        found, failed = _from_hook(plugin, implementation.name, implementation.get_hookimpls())
        parts += found
        failures += failed
    return parts, failures or ([] if parts else [plugin.failure("it registers nothing")])


def _misspelt(manager: pluggy.PluginManager, loaded: object) -> list[str]:
    """Hooks that would never be called: an unknown name, or a known one without @hookimpl."""
    marked = {caller.name for caller in manager.get_hookcallers(loaded) or ()}
    named = {
        name
        for name in dir(loaded)
        if name.startswith(f"{PROJECT}_")
        and callable(value := getattr(loaded, name))
        and not isinstance(value, ModuleType)
    }
    unknown = sorted((marked | named) - set(HOOK_SPECS))
    faults = [f"no hook is called {name}. {_known(name)}" for name in unknown]
    return faults + [
        f"{name} has no @hookimpl, so it would never be called" for name in sorted(named - marked - {*unknown})
    ]


def _known(name: str) -> str:
    return did_you_mean(name, HOOK_SPECS) or f"The hooks are {listed(HOOK_SPECS)}."


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
        items, fault = _returned(hook, expected, implementation.function)
        if fault:
            failures.append(plugin.failure(fault, expected.kind))
        for item in items:
            if not isinstance(item, expected):
                failures.append(
                    plugin.failure(f"{hook} returned {_a(item)} among its {expected.__name__}s", expected.kind)
                )
            elif fault := fault_of(item):
                failures.append(plugin.failure(fault, item.kind, str(item.name)))
            else:
                parts.append(Registered(item, plugin.entry.name, plugin.distribution, plugin.version))
    return parts, failures


def _returned(hook: str, expected: type[Spec], function: Callable[..., object]) -> tuple[list[object], str]:
    """What a hook returned, as a list, or why it is none."""
    value = function()
    if isinstance(value, Spec) or not isinstance(value, Iterable) or isinstance(value, str | bytes):
        return [], f"{hook} returned {_a(value)}, not an iterable of {expected.__name__}"
    return list(value), ""


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
