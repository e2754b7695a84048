"""What plugins, programs and users may rely on, as text in the folder `api` beside this file: a change of it is a decision.

    python tests/contract/api.py            the differences; exit code 1 if there are some
    python tests/contract/api.py --write    the text as it is now

Names, signatures and fields are read from the source, as they are written; what they inherit from classes that are not exported
stands with them. Commands come from the command line's own objects, options from their classes. Imports no torch.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from difflib import unified_diff
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Any, get_args, get_origin, get_type_hints

CORE = Path(__file__).parents[2] / "core"
FOLDER = Path(__file__).parent / "api"
ENTRY_POINTS = ("builtin", "sanavideo", "wan")
"""The plugins of this repository, whose options are part of the text; whatever else is installed is not."""

PLUGINS = ("plugins", "sanavideo_plugin", "wan_plugin", "examples/plugins", "tests/fixtures")
"""Their folders."""

WRITE = "python tests/contract/api.py --write"
WIDTH = 118
EVENTS = "vtrain.contract.events"
SPECIAL = ("__init__", "__call__", "__enter__", "__iter__", "__next__")


# -- names and signatures, from the source ---------------------------------------------------------------------------------


@cache
def tree(module: str) -> ast.Module:
    path = CORE / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return Undescribed().visit(ast.parse(file.read_text(encoding="utf-8")))


class Undescribed(ast.NodeTransformer):
    """Drops `description=...` of fields: other words change nothing that anybody relies on."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [each for each in node.keywords if each.arg != "description"]
        return self.generic_visit(node)


def exported(module: str) -> list[str]:
    """Names in its __all__; of a module without one, all that are public and defined in it."""
    body = tree(module).body
    for node in body:
        if isinstance(node, ast.Assign) and _names(node) == ["__all__"]:
            return sorted(ast.literal_eval(node.value))
    return sorted({name for node in body for name in _names(node) if not name.startswith("_")})


def _names(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def defined(module: str, name: str) -> tuple[str, ast.stmt]:
    """The module that defines what `module` calls so, and the statement. Raises LookupError."""
    for node in tree(module).body:
        if name in _names(node):
            return module, node
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vtrain"):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return defined(str(node.module), alias.name)
    raise LookupError(f"{module} does not define {name}")


def lines_of(module: str, name: str, public: frozenset[str]) -> Iterator[str]:
    """What a module exports by that name. public: names whose own members stand elsewhere in the text."""
    home, node = defined(module, name)
    if isinstance(node, ast.ClassDef):
        yield from class_lines(home, node, public)
    elif isinstance(node, ast.FunctionDef):
        yield from folded(f"def {signature(node)}")
    elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        made = isinstance(node.value, ast.JoinedStr)  # what it comes to counts
        text = repr(getattr(importlib.import_module(home), name)) if made else ast.unparse(node.value)
        yield from folded(f"{name} = {text}")


def class_lines(module: str, node: ast.ClassDef, public: frozenset[str]) -> Iterator[str]:
    bases = ", ".join([*map(ast.unparse, node.bases), *(ast.unparse(each) for each in node.keywords)])
    marks = "".join(f"@{ast.unparse(each)} " for each in node.decorator_list)
    yield from folded(f"{marks}class {node.name}{f'({bases})' if bases else ''}")
    for line in members(module, node, public).values():
        yield from folded(f"    {line}")


def members(module: str, node: ast.ClassDef, public: frozenset[str]) -> dict[str, str]:
    """Of a class and of its bases that are not public: fields in their order, then methods by name."""
    fields_of: dict[str, str] = {}
    methods: dict[str, str] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and base.id not in public:
            try:
                home, above = defined(module, base.id)
            except LookupError:  # Python's own, or another library's
                continue
            if isinstance(above, ast.ClassDef):
                inherited = members(home, above, public)
                fields_of |= {key: line for key, line in inherited.items() if "(" not in key}
                methods |= {key: line for key, line in inherited.items() if "(" in key}
    for each in node.body:
        if isinstance(each, ast.FunctionDef):
            methods |= method(each)
            fields_of |= dict(_set_on_self(each)) if each.name == "__init__" else {}
        elif isinstance(each, ast.Assign | ast.AnnAssign):
            fields_of |= {name: ast.unparse(each) for name in _names(each) if not name.startswith("_")}
    return fields_of | dict(sorted(methods.items()))


def method(node: ast.FunctionDef) -> dict[str, str]:
    """Its line, by its name and "("; nothing for a private one. A rule of the kit is its name, a fixture what it gives."""
    if node.name.startswith("_") and node.name not in SPECIAL:
        return {}
    marks = [ast.unparse(each) for each in node.decorator_list]
    if any(mark.startswith("pytest.fixture") for mark in marks):
        scope = " of the class" if 'scope="class"' in "".join(marks).replace("'", '"') else ""
        line = f"fixture{scope} {node.name} -> {ast.unparse(node.returns) if node.returns else 'None'}"
    elif node.name.startswith("test_"):
        line = f"rule {node.name}"
    elif "property" in marks or "cached_property" in marks:
        line = f"property {node.name} -> {ast.unparse(node.returns) if node.returns else 'Any'}"
    else:
        line = f"{''.join(f'@{mark} ' for mark in marks)}def {signature(node)}"
    return {f"{node.name}(": line}


def _set_on_self(init: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """Public attributes that are set with a type."""
    for node in ast.walk(init):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute) and node.target.attr[0] != "_":
            yield node.target.attr, f"{node.target.attr}: {ast.unparse(node.annotation)}"


def signature(node: ast.FunctionDef) -> str:
    gives = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){gives}"


def folded(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 8)
    return wrap(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def module_text(
    *modules: str, only: tuple[str, ...] = (), without: Callable[[str], bool] = lambda home: False
) -> Iterator[str]:
    """What modules export. only: these names; (): all. without: of the defining module, whether it stands elsewhere."""
    for module in modules:
        names = [name for name in exported(module) if name in only or not only]
        yield f"# {module}"
        for name in names:
            if not without(defined(module, name)[0]):
                yield ""
                yield from lines_of(module, name, frozenset(names))
        yield ""


# -- commands and options, from their objects --------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    from vtrain.cli.app import app

    if app.registered_callback is not None:
        yield "vtrain"
        yield from parameter_lines(app.registered_callback.callback)
    yield from command_lines("vtrain", app)


def command_lines(path: str, app: Any) -> Iterator[str]:
    """Of Typer's own records of what was registered."""
    for command in sorted(app.registered_commands, key=lambda each: str(each.name)):
        yield ""
        yield f"{path} {command.name}"
        yield from parameter_lines(command.callback)
    for group in sorted(app.registered_groups, key=lambda each: str(each.name)):
        yield from command_lines(f"{path} {group.name}", group.typer_instance)


def parameter_lines(callback: Any) -> Iterator[str]:
    hints = get_type_hints(callback, include_extras=True)
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, about = get_args(hints[name])
        # Typer keeps the first name of an option in Annotated where a default would stand.
        declared = [each for each in (about.default, *(about.param_decls or ())) if isinstance(each, str)]
        words = declared or [about.metavar or name]
        default = f" = {parameter.default!r}" if parameter.default is not inspect.Parameter.empty else ", required"
        limits = "".join(
            f", {key} {value}" for key in ("min", "max") if (value := getattr(about, key, None)) is not None
        )
        yield f"    {', '.join(words)}: {type_words(kind)}{limits}{default}"


def type_words(kind: Any) -> str:
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    inner = ", ".join(type_words(each) for each in get_args(kind) if each is not type(None))
    return f"list of {inner}" if get_origin(kind) is list else inner


def options() -> Iterator[str]:
    """Every table of the file: core's keys, then those of each part of this repository."""
    from vtrain.config import TABLES
    from vtrain.contract.specs import origin
    from vtrain.registry import discover

    catalog = discover(ENTRY_POINTS)
    for table in TABLES.values():
        rules = [f"use = {table.use}, gone = {table.gone}"] if table.kind else []
        facts = [
            "required" if table.required else "optional",
            *([f"default {table.default}"] if table.default else []),
            *rules,
        ]
        yield f"{table.header}  ({', '.join(facts)})"
        yield from option_lines(table.model)
        for name in catalog.names(table.kind) if table.kind else ():
            part = catalog.parts[table.kind, name]
            yield ""
            yield f'{table.header} use = "{name}"  ({origin(part).rpartition(" ")[0]})'
            yield from spec_lines(part.spec)
            yield from option_lines(part.spec.options)
        yield ""


def option_lines(model: Any) -> Iterator[str]:
    from vtrain.config import describe

    for option in describe(model):
        default = "required" if option.required else f"= {option.default}" if option.default else "absent"
        words = (f"{option.key}: {option.type}", default, option.limits, option.resume)
        yield from folded(f"    {'; '.join(word for word in words if word)}")


def spec_lines(spec: Any) -> Iterator[str]:
    """What a spec says beside its name, options and build."""
    for each in fields(spec):
        value = getattr(spec, each.name)
        if each.name not in ("name", "summary", "options", "build", "advice") and value:
            shown = (
                sorted(value) if isinstance(value, frozenset) else dict(value) if isinstance(value, Mapping) else value
            )
            named = [extra.name for extra in value] if each.name == "caption_extras" else shown
            yield from folded(f"    ({each.name} = {named})")


def contract() -> Iterator[str]:
    """What the package exports, then what plugins of this repository take from its modules: others may, too."""
    yield from module_text("vtrain.contract", without=lambda home: home == EVENTS)
    for module, names in sorted(taken().items()):
        yield from module_text(module, only=tuple(names))


def taken() -> dict[str, set[str]]:
    """Module below vtrain.contract -> names that a plugin of this repository imports from it. Events have a text of their own."""
    found: dict[str, set[str]] = {}
    files = (file for folder in PLUGINS for file in (CORE.parent / folder).rglob("*.py"))
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vtrain.contract."):
            found.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
    found.pop(EVENTS, None)
    return found


def events() -> Iterator[str]:
    names = importlib.import_module(EVENTS).EVENTS
    yield f"names: {', '.join(names)}"
    yield ""
    yield from module_text(EVENTS)


def library() -> Iterator[str]:
    yield from module_text("vtrain.api")
    yield from module_text("vtrain.run.session", only=("Session",))
    yield from module_text("vtrain.run.prepare", only=("Prepared",))


PARTS: Mapping[str, Callable[[], Iterator[str]]] = {
    "contract": contract,
    "testing": lambda: module_text("vtrain.testing", "vtrain.testing.memory"),
    "library": library,
    "events": events,
    "commands": commands,
    "options": options,
}


def texts() -> dict[str, str]:
    """File name -> the text as it is now."""
    os.environ.setdefault("VTRAIN_PLUGIN_TIMEOUT", "0")
    return {f"{name}.txt": "\n".join(make()).rstrip() + "\n" for name, make in PARTS.items()}


def differences(now: Mapping[str, str], folder: Path = FOLDER) -> list[str]:
    """Lines of a diff from what is checked in to what is, file by file."""
    there = {file.name: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))}
    found: list[str] = []
    for name in sorted(there.keys() | now.keys()):
        before, after = there.get(name, "").splitlines(), now.get(name, "").splitlines()
        found += unified_diff(before, after, f"api/{name}", f"api/{name}, as it is", lineterm="")
    return found


def main(arguments: list[str]) -> int:
    now = texts()
    if "--write" in arguments:
        FOLDER.mkdir(exist_ok=True)
        for file in FOLDER.glob("*.txt"):
            file.unlink()
        for name, text in now.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
        return 0
    found = differences(now)
    print("\n".join([*found, f"If that is meant: {WRITE}"] if found else ["no differences"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
