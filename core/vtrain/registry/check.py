"""`vtrain plugins check`: the rules of the conformance kit that need no model, on an installed plugin; what fails is a finding.

The rules stand in `vtrain.contract.spec_rules` and `plugin_rules`, where the kit calls the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from vtrain.contract import (
    API_VERSION,
    Catalog,
    ConfigError,
    OptimizerSpec,
    PluginError,
    Problem,
    Registered,
    Spec,
    plugin_rules,
    spec_rules,
)
from vtrain.contract.plugin_rules import Tables, line_of, said
from vtrain.contract.spec_rules import NotChecked, OptionsNeeded, Table
from vtrain.contract.specs import NOUNS, did_you_mean, listed
from vtrain.registry.discovery import (
    ALLOW,
    Installed,
    allowed,
    canonical,
    discover,
    installed,
    refusal_of,
)
from vtrain.registry.guard import in_time, stdout_on_stderr
from vtrain.registry.spelling import declared_faults, faults, makers
from vtrain.registry.trials import faults as trial_faults
from vtrain.registry.trials import limit_s

Result = Literal["ok", "problem", "not checked"]


@dataclass(frozen=True)
class Outcome:
    """Of one rule. part: "family toy", "" for the plugin as a whole. problem: what is wrong, or why it was not checked."""

    rule: str
    part: str
    result: Result
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
        raise ConfigError(Problem("", f'"{name}" has no {NOUNS[kind][0]}.', "Check all its parts, without --kind."))
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
    value, module, rules = plugin.entry.value, plugin.entry.module, plugin_rules
    outcomes = list(_tried(rules.the_plugin_is_installed_under_an_entry_point, module, module=module))
    if refused := _refused(plugin):
        return Report(plugin, (), (*outcomes, refused))
    outcomes += _tried(rules.only_the_contract_is_imported, value, module=module)
    loaded, fault = _imported(plugin)
    if fault is not None:
        return Report(plugin, (), (*outcomes, Outcome(IMPORTED, "", "problem", fault)))
    outcomes.append(Outcome(IMPORTED, "", "ok"))
    specs = list[Spec]()
    with stdout_on_stderr(), in_time(limit_s()):
        for rule in (rules.hooks_are_spelt_right, rules.hooks_return_specs_of_their_kind):
            outcomes += _tried(rule, loaded, module=module)
        with suppress(Exception):  # of a hook, which the rule before says
            specs = [spec for spec in rules.specs_of(loaded) if kind in (None, spec.kind)]
        for spec in specs:
            outcomes += _of_spec(spec, plugin, catalog, _table(spec, tables))
    outcomes += _tried(rules.registration_imports_nothing_heavy, value, module=module)
    for spec in specs:
        outcomes += _of_part(spec, plugin, _table(spec, tables))
    return Report(plugin, tuple(_title(spec) for spec in specs), tuple(outcomes))


def _table(spec: Spec, tables: Tables) -> Table:
    return tables.get((spec.kind, spec.name), {}) if isinstance(spec.name, str) else {}


IMPORTED = "the_plugin_can_be_imported"


def _refused(plugin: Installed) -> Outcome | None:
    """Of a plugin that no command imports. That it speaks another version is what the rule before says, unless it speaks both."""
    reason = refusal_of(plugin, allowed())
    if not reason:
        return None
    if plugin.api != API_VERSION:
        return Outcome(IMPORTED, "", "not checked", Problem("", reason))
    return Outcome(IMPORTED, "", "problem", Problem("", f"it is {reason}.", f"Name it there, or unset {ALLOW}."))


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
            fault, place = said(error), line_of(error, plugin.entry.module)
    what = f"{plugin.entry.value}: {fault.removesuffix('.')}."
    return None, Problem(place, what, "Its import must come back, without an error; then the other rules are checked.")


def _title(spec: Spec) -> str:
    return f"{NOUNS[spec.kind][0]} {spec.name}"


HINT = "--config names a run's file, of which parts take the options that they need."


def _tried(rule: Callable[..., Iterable[Problem]], *given: object, module: str, part: str = "") -> Iterator[Outcome]:
    """What comes of a rule; what a plugin's own code raises meanwhile is a finding. module: of its entry point."""
    name = rule.__name__
    try:
        found = list(rule(*given))
    except NotChecked as error:
        yield Outcome(name, part, "not checked", _untried(error))
        return
    except (Exception, SystemExit) as error:
        remedy = "Correct what raises: a run asks for the same, and would end there."
        found = [Problem(line_of(error, module), f"it raises {said(error)}.", remedy)]
    yield from (Outcome(name, part, "problem", problem) for problem in found)
    if not found:
        yield Outcome(name, part, "ok")


def _untried(reason: NotChecked) -> Problem:
    return Problem("", str(reason), HINT if isinstance(reason, OptionsNeeded) else "")


def names_are_nobody_elses(spec: Spec, plugin: Installed, catalog: Catalog) -> Iterator[Problem]:
    """No other distribution has a part of that kind and name: nobody could use either."""
    mine = (plugin.entry.name, plugin.distribution)
    owners = {owner for kind, name, owner in _named(catalog) if (kind, name) == (spec.kind, spec.name)}
    for entry, distribution in sorted(owners - {mine}):
        what = f'the {_title(spec)} is also registered by "{entry}" of {distribution}: neither can be used.'
        yield Problem("", what, "Rename it, such as with the distribution's name in front.")


def _of_spec(spec: Spec, plugin: Installed, catalog: Catalog, table: Table) -> Iterator[Outcome]:
    about = {"part": _title(spec), "module": plugin.entry.module}
    for rule in spec_rules.SPEC_RULES:
        if isinstance(spec, spec_rules.OF_KINDS.get(rule, Spec)):
            yield from _tried(rule, spec, table, **about)
    yield from _tried(names_are_nobody_elses, spec, plugin, catalog, **about)


def _of_part(spec: Spec, plugin: Installed, table: Table) -> Iterator[Outcome]:
    """The rules for which a part is built: in a process of its own first, and here if nothing was wrong with it there."""
    heavy = plugin_rules.parts_are_built_without_anything_heavy
    about = {"part": _title(spec), "module": plugin.entry.module}
    whose = Registered(spec, plugin.entry.name, plugin.distribution, plugin.version)
    reason = _hindrance(spec, table)
    if reason is None:
        found = list(_tried(heavy, plugin.entry.value, {(spec.kind, spec.name): table}, **about))
        yield from found
        reason = NotChecked(f"see {heavy.__name__}") if any(each.problem for each in found) else None
    else:
        yield Outcome(heavy.__name__, about["part"], "not checked", _untried(reason))
    for rule in (a_part_is_what_its_kind_must_be, abilities_are_spelt_right):
        if reason is not None:
            yield Outcome(rule.__name__, about["part"], "not checked", _untried(reason))
            continue
        with stdout_on_stderr(), in_time(limit_s()):
            yield from _tried(rule, whose, table, **about)


def _hindrance(spec: Spec, table: Table) -> NotChecked | None:
    """Why a part cannot be built of a table; None if it can."""
    if isinstance(spec, OptimizerSpec):
        return NotChecked(plugin_rules.OPTIMIZER)
    if not isinstance(spec.name, str):
        return NotChecked("its name is no text")
    try:
        spec_rules.options_of(spec, table)
    except NotChecked as error:
        return error
    except Exception as error:  # what validators raise
        return NotChecked(f"its options cannot be read: {said(error)}")
    return None


def a_part_is_what_its_kind_must_be(whose: Registered, table: Table) -> Iterator[Problem]:
    """What build gives has every member of its kind's protocol."""
    part = plugin_rules.built(whose.spec, table)
    yield from plugin_rules.a_part_is_what_its_kind_must_be(whose.spec, part)


def abilities_are_spelt_right(whose: Registered, table: Table) -> Iterator[Problem]:
    """No public name of a part, or of what its methods say they give, is almost that of an ability which it lacks.

    What its methods say they give has every member that it must have, and of an ability all members or few.
    """
    part = plugin_rules.built(whose.spec, table)
    yield from faults(NOUNS[whose.spec.kind][0], part, whose, "")
    for sort, maker in makers(whose.spec.kind, part):
        yield from declared_faults(sort, maker, whose, "")
