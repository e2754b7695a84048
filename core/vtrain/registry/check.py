"""`vtrain plugins check`: the rules of the conformance kit that need no model, on an installed plugin; what fails is a finding.

The rules stand in `vtrain.contract.spec_rules` and `plugin_rules`, where the kit calls the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from vtrain.contract import (
    Catalog,
    ConfigError,
    FamilySpec,
    OptimizerSpec,
    PluginError,
    Problem,
    Registered,
    Spec,
    plugin_rules,
    spec_rules,
)
from vtrain.contract.plugin_rules import Tables
from vtrain.contract.spec_rules import NotChecked, Table
from vtrain.contract.specs import NOUNS, did_you_mean, listed
from vtrain.registry.discovery import Installed, canonical, described, discover, installed
from vtrain.registry.guard import in_time, stdout_on_stderr
from vtrain.registry.spelling import declared_faults, faults
from vtrain.registry.trials import faults as trial_faults
from vtrain.registry.trials import limit_s


@dataclass(frozen=True)
class Outcome:
    """Of one rule. part: "family toy", "" for the plugin as a whole. problem: what is wrong, or why it was not checked."""

    rule: str
    part: str
    result: Literal["ok", "problem", "not checked"]
    problem: Problem | None = None


@dataclass(frozen=True)
class Report:
    """Of one plugin. parts: "family toy" ..."""

    plugin: Installed
    parts: tuple[str, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def problems(self) -> tuple[Outcome, ...]:
        return tuple(each for each in self.outcomes if each.result == "problem")


def check(name: str, kind: str | None = None, tables: Tables | None = None) -> tuple[Report, ...]:
    """Of every plugin that `name` is the entry point, the distribution or a part of.

    kind: only parts of that kind. tables: (kind, name) -> options for parts that need some. Raises ConfigError where nothing is
    called so, PluginError where a distribution's declaration cannot be read.
    """
    catalog = discover()
    reports = [_report(plugin, catalog, kind, tables or {}) for plugin in _called(name, catalog, kind)]
    if kind and not any(report.parts for report in reports) and not any(report.problems for report in reports):
        raise ConfigError(Problem("", f'"{name}" has no {NOUNS[kind][0]}.', "Leave --kind out to check all its parts."))
    return tuple(reports)


def _called(name: str, catalog: Catalog, kind: str | None) -> list[Installed]:
    plugins, failures = installed()
    torn = [each for each in failures if canonical(each.distribution) == canonical(name)]
    if torn:
        raise PluginError(Problem(each.distribution, each.reason, "Install it again.") for each in torn)
    found = [each for each in plugins if name == each.entry.name or canonical(name) == canonical(each.distribution)]
    owners = {tail for sort, called, tail in _named(catalog) if called == name and kind in (None, sort)}
    found = found or [each for each in plugins if (each.entry.name, each.distribution) in owners]
    if not found:
        known = {each.entry.name for each in plugins} | {each.distribution for each in plugins}
        hint = did_you_mean(name, known | {called for _, called, _ in _named(catalog) if called})
        remedy = f"{hint} Installed plugins: {listed(known)}. One that is new is installed with `pip install -e .`."
        raise ConfigError(Problem("", f'no plugin, distribution or part is called "{name}".', remedy.strip()))
    return found


def _named(catalog: Catalog) -> list[tuple[str, str, tuple[str, str]]]:
    """(kind, name, (entry point, distribution)) of every part, those that cannot be used too."""
    found = [(part.spec.kind, part.spec.name, (part.entry_point, part.distribution)) for part in catalog.parts.values()]
    return found + [(each.kind, each.name, (each.entry_point, each.distribution)) for each in catalog.failures]


def _report(plugin: Installed, catalog: Catalog, kind: str | None, tables: Tables) -> Report:
    value, rules = plugin.entry.value, plugin_rules
    outcomes = [
        *_tried(rules.the_plugin_is_installed_under_an_entry_point, plugin.entry.module),
        *_tried(rules.only_the_contract_is_imported, value),
    ]
    loaded, fault = _imported(plugin)
    if fault is not None:
        return Report(plugin, (), (*outcomes, Outcome(IMPORTED, "", "problem", fault)))
    outcomes.append(Outcome(IMPORTED, "", "ok"))
    specs = list[Spec]()
    with stdout_on_stderr(), in_time(limit_s()):
        for rule in (rules.hooks_are_spelt_right, rules.hooks_return_specs_of_their_kind):
            outcomes += _tried(rule, loaded)
        with suppress(Exception):  # of a hook, which the rule before says
            specs = [spec for spec in rules.specs_of(loaded) if kind in (None, spec.kind)]
        for spec in specs:
            outcomes += _of_spec(spec, plugin, catalog, tables.get((spec.kind, spec.name), {}))
    outcomes += _tried(rules.registration_imports_nothing_heavy, value)
    for spec in specs:
        outcomes += _of_part(spec, plugin, tables.get((spec.kind, spec.name), {}))
    return Report(plugin, tuple(_title(spec) for spec in specs), tuple(outcomes))


IMPORTED = "the_plugin_can_be_imported"


def _imported(plugin: Installed) -> tuple[object, Problem | None]:
    """What its entry point names, and why it cannot be imported: tried in a process of its own, then in this one."""
    (fault,) = trial_faults([plugin])
    place = ""
    if not fault:
        try:
            with stdout_on_stderr(), in_time(limit_s()):
                return plugin.entry.load(), None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module that calls sys.exit() breaks itself only
            fault = described(error, plugin.entry.module)
            place = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else ""
    what = f"{plugin.entry.value}: {fault.removesuffix('.')}."
    return None, Problem(place, what, "Its import must come back, without an error; then the other rules are checked.")


def _title(spec: Spec) -> str:
    return f"{NOUNS[spec.kind][0]} {spec.name}"


HINT = "--config names a run's file, of which parts take the options that they need."


def _tried(rule: Callable[..., Iterable[Problem]], *given: object, part: str = "") -> Iterator[Outcome]:
    """What comes of a rule; what a plugin's own code raises meanwhile is a finding."""
    name = rule.__name__
    try:
        found = list(rule(*given))
    except NotChecked as error:
        yield Outcome(name, part, "not checked", Problem("", str(error), HINT))
        return
    except (Exception, SystemExit) as error:
        found = [Problem("", f"it raises {described(error, '')}.", "A rule asks only for what a run asks for too.")]
    yield from (Outcome(name, part, "problem", problem) for problem in found)
    if not found:
        yield Outcome(name, part, "ok")


def names_are_nobody_elses(spec: Spec, plugin: Installed, catalog: Catalog) -> Iterator[Problem]:
    """No other distribution has a part of that kind and name: nobody could use either."""
    mine = (plugin.entry.name, plugin.distribution)
    owners = {owner for kind, name, owner in _named(catalog) if (kind, name) == (spec.kind, spec.name)}
    for entry, distribution in sorted(owners - {mine}):
        what = f'the {_title(spec)} is also registered by "{entry}" of {distribution}: neither can be used.'
        yield Problem("", what, "Rename it, such as with the distribution's name in front.")


def _of_spec(spec: Spec, plugin: Installed, catalog: Catalog, table: Table) -> Iterator[Outcome]:
    for rule in spec_rules.SPEC_RULES:
        if isinstance(spec, spec_rules.OF_KINDS.get(rule, Spec)):
            yield from _tried(rule, spec, table, part=_title(spec))
    yield from _tried(names_are_nobody_elses, spec, plugin, catalog, part=_title(spec))


def _of_part(spec: Spec, plugin: Installed, table: Table) -> Iterator[Outcome]:
    """The rules for which a part is built: in a process of its own first, and here if nothing was wrong with it there."""
    title, heavy = _title(spec), plugin_rules.parts_are_built_without_anything_heavy
    whose = Registered(spec, plugin.entry.name, plugin.distribution, plugin.version)
    reason = _hindrance(spec, table)
    if not reason:
        found = list(_tried(heavy, plugin.entry.value, {(spec.kind, spec.name): table}, part=title))
        yield from found
        reason = f"see {heavy.__name__}" if any(each.problem for each in found) else ""
    else:
        yield Outcome(heavy.__name__, title, "not checked", Problem("", reason, HINT))
    for rule in (a_part_is_what_its_kind_must_be, abilities_are_spelt_right):
        if reason:
            yield Outcome(rule.__name__, title, "not checked", Problem("", reason))
            continue
        with stdout_on_stderr(), in_time(limit_s()):
            yield from _tried(rule, whose, table, part=title)


def _hindrance(spec: Spec, table: Table) -> str:
    """Why a part cannot be built of a table; "" if it can."""
    if isinstance(spec, OptimizerSpec):
        return "an optimizer is built with torch, of a model's parameters: the kit's OptimizerTests does it"
    try:
        spec_rules.options_of(spec, table)
    except NotChecked as error:
        return str(error)
    except Exception as error:  # pydantic's, and what validators raise
        return f"its options cannot be read: {' '.join(str(error).split())}"
    return ""


def a_part_is_what_its_kind_must_be(whose: Registered, table: Table) -> Iterator[Problem]:
    """What build gives has every member of its kind's protocol."""
    part = plugin_rules.built(whose.spec, table)
    yield from plugin_rules.a_part_is_what_its_kind_must_be(whose.spec, part)


def abilities_are_spelt_right(whose: Registered, table: Table) -> Iterator[Problem]:
    """No public name of a part, or of what its methods say they give, is almost that of an ability which it lacks."""
    part = plugin_rules.built(whose.spec, table)
    yield from faults(NOUNS[whose.spec.kind][0], part, whose, "")
    loads = (
        {"load_denoiser": "denoiser", "open_video_codec": "video codec"} if isinstance(whose.spec, FamilySpec) else {}
    )
    if whose.spec.kind == "regularizer":
        loads = {"load": "loss module"}
    for method, sort in loads.items():
        maker = getattr(part, method, None)
        if callable(maker):
            yield from declared_faults(sort, maker, whose, "")
