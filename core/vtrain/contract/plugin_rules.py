"""The rules of a plugin: its entry point, its hooks, its imports, what its parts are. Rules as in spec_rules.py."""

from __future__ import annotations

import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

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
    with_article,
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
    hooks = [(name, getattr(entry, name, None)) for name in HOOK_SPECS]
    return [spec for name, hook in hooks if callable(hook) for spec in returned(name, hook)[0]]


def returned(name: str, hook: Callable[..., object]) -> tuple[list[Spec], list[str]]:
    """The specs of its kind that a hook returns, and what is wrong with all else. Raises what the plugin's own code raises."""
    kind, value = HOOK_SPECS[name], hook()
    if not isinstance(value, Iterable) or isinstance(value, Spec | str | bytes):
        return [], [f"{name} returned {_typed(value)}, not an iterable of {kind.__name__}"]
    specs, others = list[Spec](), list[str]()
    for each in value:
        if isinstance(each, kind):
            specs.append(each)
        else:
            others.append(f"{name} returned {_typed(each)} among its {kind.__name__}s")
    return specs, others


def _typed(value: object) -> str:
    return "None" if value is None else with_article(type(value).__name__)


def hooks_return_specs_of_their_kind(entry: object) -> Problems:
    """Each hook returns an iterable of its kind of spec, the same each time, no name twice."""
    for name, hook in hooks_of(entry).items():
        kind = HOOK_SPECS.get(name)
        if kind is None or not callable(hook) or inspect.signature(hook).parameters:  # the rule above says so
            continue
        place, (specs, others) = place_of(hook), returned(name, hook)
        for other in dict.fromkeys(others):
            yield Problem(place, f"{other}.", f"Return a tuple of {kind.__name__}s alone.")
        names = [spec.name for spec in specs if isinstance(spec.name, str)]
        for twice in sorted({each for each in names if names.count(each) > 1}):
            yield Problem(place, f'{name} returns a name twice: "{twice}".', "Rename one.")
        if not others and specs != returned(name, hook)[0]:
            remedy = "Make the specs once, at the top of a module."
            yield Problem(place, f"{name} returns something else the second time.", remedy)


def a_part_is_what_its_kind_must_be(spec: Spec, part: object) -> Problems:
    """What build gives has every member of its kind's protocol."""
    from vtrain.contract.abilities import ABILITIES, lacking

    noun = NOUNS[spec.kind][0]
    if fault := lacking(noun, part):
        remedy = f"{ABILITIES[noun].must.__name__} in vtrain.contract says what each member means."
        place = place_of(part if isinstance(part, type) else type(part))
        yield Problem(place, f"build gave {fault}: it is no {noun}.", remedy)


OPTIMIZER = "an optimizer is built with torch, of a model's parameters: the kit's OptimizerTests does it"
"""Why no rule here builds one."""


def built(spec: Spec, table: Table) -> object:
    """The part, of its options. Raises NotChecked, and what the plugin's own code raises."""
    if isinstance(spec, OptimizerSpec):
        raise NotChecked(OPTIMIZER)
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
import json, sys
from importlib.metadata import EntryPoint
path, value, heavy, tables, mark = map(json.loads, sys.argv[1:])
sys.path[:] = path
from vtrain.contract import SupportsStepCheck
from vtrain.contract.plugin_rules import Found, built, line_of, said, specs_of
def seen():
    return sorted(set(heavy) & sys.modules.keys())
module = value.partition(":")[0]
try:
    specs = specs_of(EntryPoint("probed", value, "").load())
    found = {"registration": Found(seen())}
except Exception as error:
    found, tables = {"registration": Found([], f"raises {said(error)}", line_of(error, module))}, []
for kind, name, table in tables:
    before, spec = seen(), next(each for each in specs if (each.kind, each.name) == (kind, name))
    try:
        part = built(spec, table)
        if isinstance(part, SupportsStepCheck):
            part.check_steps(50)
        found[f"{kind} {name}"] = Found([each for each in seen() if each not in before])
    except Exception as error:
        found[f"{kind} {name}"] = Found([], said(error), line_of(error, module))
print("\\n" + mark + json.dumps(found), flush=True)
"""
"""Run in a process of its own: which heavy modules registration, and building each of the given parts, import."""

_MARK = "found by vtrain: "
"""In front of the line with what was found: the plugin may print more, also when its process ends."""

Tables = Mapping[tuple[str, str], Table]
"""(kind, name) -> what its table needs."""


class Found(NamedTuple):
    """Heavy modules that registration, or building a part, imports; or what went wrong, and the plugin's line."""

    heavy: Sequence[str]
    fault: str = ""
    place: str = ""


def _probed(value: str, tables: Tables) -> dict[str, Found]:
    """ "registration", "family toy" -> what was found. value: of the entry point."""
    import subprocess

    given = json.dumps([(kind, name, dict(table)) for (kind, name), table in tables.items()])
    about = (json.dumps(each) for each in (sys.path, value, HEAVY))
    command = [sys.executable, "-c", _PROBE, *about, given, json.dumps(_MARK)]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=PROBE_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"registration": Found([], f"takes longer than {PROBE_S:g} s")}
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"registration": Found([], f"ends with: {last}")}
    lines = done.stdout.decode(errors="replace").splitlines()
    found = next((line.removeprefix(_MARK) for line in reversed(lines) if line.startswith(_MARK)), None)
    if found is None:
        return {"registration": Found([], "ends Python, with exit code 0")}
    return {name: Found(*each) for name, each in json.loads(found).items()}


def registration_imports_nothing_heavy(value: str) -> Problems:
    """Importing the entry module and calling its hooks imports no torch, diffusers, transformers or accelerate."""
    found = _probed(value, {})["registration"]
    if found.fault:
        what = f"importing {value} {found.fault}."
        yield Problem(found.place, what, "Registration describes: it reads and loads nothing.")
    elif found.heavy:
        heavy = (place for place, name, top in imports_of(value) if top and name.split(".")[0] in found.heavy)
        place, what = next(heavy, ""), f"importing {value} imports {', '.join(found.heavy)}."
        yield Problem(place, what, "Import it in the functions that need it; for types, below `if TYPE_CHECKING:`.")


def parts_are_built_without_anything_heavy(value: str, tables: Tables) -> Problems:
    """Every part of `tables` is built from its options, without torch, diffusers, transformers or accelerate."""
    found = _probed(value, tables)
    before = found.pop("registration")
    if before.fault:
        what = f"importing {value} and building its parts {before.fault}."
        yield Problem(before.place, what, "Neither reads or loads anything.")
    for part, (heavy, fault, place) in found.items():
        if fault:
            remedy = "A part is built before anything is read or loaded."
            yield Problem(place, f"building {part} raises {fault}.", remedy)
        elif heavy:
            remedy = "Import it in the methods that load or open something."
            yield Problem("", f"building {part} imports {', '.join(heavy)}.", remedy)


def package_of(module: str) -> str:
    """ "toy" of "toy.plugin"; "company.toy" of "company.toy.plugin", where company is a namespace in which others have packages."""
    import importlib.util

    parts = module.split(".")
    for number in range(1, len(parts)):
        name = ".".join(parts[:number])
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # ValueError: a module that runs as a script has no spec
            return name
        if spec is None or spec.origin is not None:
            return name
    return module


def said(error: BaseException) -> str:
    """ "ImportError: no module named x", on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def line_of(error: BaseException, module: str) -> str:
    """ "toy/plugin.py:3", the deepest line of the package of a plugin's module on an error's way; "" if none is."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    own = f"{package_of(module)}."
    lines = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if f"{frame.f_globals.get('__name__', '')}.".startswith(own)
    ]
    return lines[-1] if lines else ""


def imports_of(value: str) -> Iterator[tuple[str, str, bool]]:
    """("/plugin/file.py:12", absolute module, whether it is imported with the file) of every import in the entry point's package.

    Also those inside of functions. Raises NotChecked where there is no source.
    """
    import ast
    import importlib.util

    found = importlib.util.find_spec(package_of(value.partition(":")[0]))
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
