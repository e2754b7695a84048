"""The rules of a plugin: its entry point, its hooks, its imports, what its parts are. Rules as in spec_rules.py."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vtrain.contract.errors import Problem
from vtrain.contract.spec_rules import NotChecked, Problems, Table, options_of, place_of
from vtrain.contract.specs import (
    API_VERSION,
    ENTRY_POINT_GROUP,
    HOOK_SPECS,
    NOUNS,
    PROJECT,
    OptimizerSpec,
    SamplerSpec,
    Spec,
    did_you_mean,
    listed,
)

if TYPE_CHECKING:
    import ast

# -- its hooks -------------------------------------------------------------------------------------------------------------


def hooks_of(entry: object) -> dict[str, object]:
    """What the entry module, or object, offers under a hook's prefix or marks as an implementation."""
    found = {name: getattr(entry, name, None) for name in dir(entry)}
    return {
        name: value
        for name, value in found.items()
        if not isinstance(value, ModuleType)
        and (_is_marked(value) or name in HOOK_SPECS or (name.startswith(f"{PROJECT}_") and callable(value)))
    }


def _is_marked(value: object) -> bool:
    return hasattr(value, f"{PROJECT}_impl")


def hooks_are_spelt_right(entry: object) -> Problems:
    """Every hook of the entry module is one of the six, takes no argument and is marked with @hookimpl."""
    hooks = hooks_of(entry)
    if not hooks:
        yield Problem("", "it registers nothing.", "Give it a hook, such as vtrain_samplers, marked with @hookimpl.")
    for name in sorted(hooks.keys() - HOOK_SPECS.keys()):
        known = did_you_mean(name, HOOK_SPECS) or f"The hooks are {listed(HOOK_SPECS)}."
        yield Problem(place_of(hooks[name]), f"no hook is called {name}. {known}", "Rename it.")
    for name in sorted(hooks.keys() & HOOK_SPECS.keys()):
        hook = hooks[name]
        if not callable(hook):
            yield Problem("", f"{name} is not a function.", "Make it one that returns the specs.")
        elif not _is_marked(hook):
            remedy = "Put @hookimpl above it, from vtrain.contract."
            yield Problem(place_of(hook), f"{name} has no @hookimpl, so it would never be called.", remedy)
        elif given := ", ".join(inspect.signature(hook).parameters):
            what = f"a registration hook takes no arguments: {name} takes {given}."
            yield Problem(place_of(hook), what, "What a part needs comes with its options.")


def specs_of(entry: object) -> list[Spec]:
    """All that the hooks return and that is a spec of the hook's kind."""
    return [
        spec for hook, kind in HOOK_SPECS.items() for spec in getattr(entry, hook, tuple)() if isinstance(spec, kind)
    ]


def hooks_return_specs_of_their_kind(entry: object) -> Problems:
    """Each hook returns an iterable of its kind of spec, the same each time, no name twice."""
    for name, hook in hooks_of(entry).items():
        kind = HOOK_SPECS.get(name)
        if kind is None or not callable(hook):
            continue
        place, specs = place_of(hook), hook()
        if not isinstance(specs, Iterable) or isinstance(specs, Spec | str | bytes):
            what = f"{name} returns {_a(specs)}, not an iterable of {kind.__name__}."
            yield Problem(place, what, "Return a tuple of the specs.")
            continue
        specs = list(specs)
        if others := {type(spec).__name__ for spec in specs if not isinstance(spec, kind)}:
            what = f"{name} returns {listed(others)} among its {kind.__name__}s."
            yield Problem(place, what, f"Return {kind.__name__}s alone.")
            continue
        names = [spec.name for spec in specs]
        for twice in sorted({each for each in names if names.count(each) > 1}):
            yield Problem(place, f'{name} returns a name twice: "{twice}".', "Rename one.")
        if specs != list(hook()):
            remedy = "Make the specs once, at the top of a module."
            yield Problem(place, f"{name} returns something else the second time.", remedy)


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def a_part_is_what_its_kind_must_be(spec: Spec, part: object) -> Problems:
    """What build gives has every member of its kind's protocol."""
    from vtrain.contract.abilities import ABILITIES, members

    noun = NOUNS[spec.kind][0]
    absent = sorted(name for name in members(ABILITIES[noun].must) if name not in dir(part) and not hasattr(part, name))
    if absent:
        what = f"build gives {_a(part)}, which has no {listed(absent)}: it is no {noun}."
        remedy = f"{ABILITIES[noun].must.__name__} in vtrain.contract says what each means."
        yield Problem(place_of(type(part)), what, remedy)


def built(spec: Spec, table: Table) -> object:
    """The part, of its options. Raises NotChecked, and what the plugin's own code raises."""
    if isinstance(spec, OptimizerSpec):
        raise NotChecked("an optimizer is built with torch, of a model's parameters: OptimizerTests does it")
    options, build = options_of(spec, table), vars(spec)["build"]
    return build(options, {}) if isinstance(spec, SamplerSpec) else build(options)


# -- its entry point and its imports -----------------------------------------------------------------------------------------


def the_plugin_is_installed_under_an_entry_point(module: str) -> Problems:
    """The distribution declares the entry module in the group of this API version."""
    from importlib.metadata import entry_points

    groups = [group for group in entry_points().groups if re.fullmatch(rf"{PROJECT}\.v\d+", group)]
    declared = {
        group for group in groups for entry in entry_points(group=group) if entry.value.partition(":")[0] == module
    }
    if ENTRY_POINT_GROUP in declared:
        return
    if declared:
        what = f"{module} is declared in the group {listed(declared)}; this vtrain speaks version {API_VERSION}."
        yield Problem("", what, f'Declare it in [project.entry-points."{ENTRY_POINT_GROUP}"], or take another vtrain.')
    else:
        what = f"no installed distribution declares {module} in the group {ENTRY_POINT_GROUP}."
        remedy = f'[project.entry-points."{ENTRY_POINT_GROUP}"] in pyproject.toml, then `pip install -e .`.'
        yield Problem("", what, remedy)


HEAVY = ("torch", "diffusers", "transformers", "accelerate")

PROBE_S = 120.0
"""Seconds that registering and building may take."""

_PROBE = """
import json, sys, traceback
from importlib.metadata import EntryPoint
path, value, heavy, tables = map(json.loads, sys.argv[1:])
sys.path[:] = path
from vtrain.contract import HOOK_SPECS, SupportsStepCheck
def seen():
    return sorted(set(heavy) & sys.modules.keys())
entry = EntryPoint("probed", value, "").load()
specs = {(spec.kind, spec.name): spec for hook in HOOK_SPECS for spec in getattr(entry, hook, tuple)()}
found = {"registration": seen()}
for kind, name, table in tables:
    before, spec = seen(), specs[kind, name]
    try:
        part = spec.build(spec.options.model_validate(table), *([{}] if kind == "sampler" else []))
        if isinstance(part, SupportsStepCheck):
            part.check_steps(50)
        found[f"{kind} {name}"] = [each for each in seen() if each not in before]
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        found[f"{kind} {name}"] = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
print("\\n" + json.dumps(found))
"""
"""Run in a process of its own: which heavy modules registration, and building each of the given parts, import."""

Tables = Mapping[tuple[str, str], Table]
"""(kind, name) -> what its table needs."""


def _probed(value: str, tables: Tables) -> dict[str, list[str] | str]:
    """ "registration", "family toy" -> heavy modules that it imports, or in one text what went wrong. value: of the entry point."""
    import subprocess

    given = json.dumps([(kind, name, dict(table)) for (kind, name), table in tables.items()])
    command = [sys.executable, "-c", _PROBE, json.dumps(sys.path), json.dumps(value), json.dumps(HEAVY), given]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PROBE_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return {"registration": f"takes longer than {PROBE_S:g} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"registration": f"ends with: {last}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def registration_imports_nothing_heavy(value: str) -> Problems:
    """Importing the entry module and calling its hooks imports no torch, diffusers, transformers or accelerate."""
    heavy = _probed(value, {})["registration"]
    if isinstance(heavy, str):
        yield Problem("", f"importing {value} {heavy}.", "Registration describes: it reads and loads nothing.")
    elif heavy:
        place = next((place for place, name, top in imports_of(value) if top and name.split(".")[0] in heavy), "")
        what = f"importing {value} imports {', '.join(heavy)}."
        yield Problem(place, what, "Import it in the functions that need it; for types, below `if TYPE_CHECKING:`.")


def parts_are_built_without_anything_heavy(value: str, tables: Tables) -> Problems:
    """Every part of `tables` is built from its options, without torch, diffusers, transformers or accelerate."""
    found = _probed(value, tables)
    before = found.pop("registration")
    if isinstance(before, str):
        yield Problem("", f"importing {value} and building its parts {before}.", "Neither reads or loads anything.")
    for part, heavy in found.items():
        if isinstance(heavy, str):
            yield Problem("", f"building {part} raises {heavy}.", "A part is built before anything is read or loaded.")
        elif heavy:
            remedy = "Import it in the methods that load or open something."
            yield Problem("", f"building {part} imports {', '.join(heavy)}.", remedy)


def imports_of(value: str) -> Iterator[tuple[str, str, bool]]:
    """("/plugin/file.py:12", absolute module, whether it is imported with the file) of every import in the entry point's package.

    Also those inside of functions. Raises NotChecked where there is no source.
    """
    import ast
    import importlib.util

    found = importlib.util.find_spec(value.partition(":")[0].split(".")[0])
    if found is None:
        raise NotChecked(f"the source of {value} is not found")
    roots = [Path(place) for place in found.submodule_search_locations or ()] or [Path(str(found.origin))]
    for root in roots:
        for file in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
            except (SyntaxError, ValueError) as error:
                raise NotChecked(f"{file} is no Python source: {error}") from error
            for node, top in _nodes(tree, True):
                yield from ((f"{file}:{line}", name, top) for line, name in _imported(node))


def _nodes(node: ast.AST, top: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below one; top: whether they run when the module is imported."""
    import ast

    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield child, top
        yield from _nodes(child, top and not lazy and not typing)


def _imported(node: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of an import."""
    import ast

    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        inside = [f"{PROJECT}.{alias.name}" for alias in node.names]
        yield from ((node.lineno, name) for name in (inside if node.module == PROJECT else [node.module]))


def only_the_contract_is_imported(value: str) -> Problems:
    """The package imports vtrain.contract and nothing else of vtrain, so that core can change behind it."""
    for place, name, _ in imports_of(value):
        if name.split(".")[0] == PROJECT and name.split(".")[:2] != [PROJECT, "contract"]:
            remedy = "Import from vtrain.contract; tests may import vtrain.testing, outside of the package."
            yield Problem(place, f"it imports {name}.", remedy)
