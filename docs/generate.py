"""Writes the generated parts of the pages: `python docs/generate.py` after a key, a default or a part has changed.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; the rest of a page is written by hand.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import vtrain.testing
from vtrain.config import TABLES, Option, Table, describe
from vtrain.config.schema import REFUSED
from vtrain.contract import Catalog, DatasetStatistics, Options, Registered, Section, StepMetrics
from vtrain.contract.events import EVENTS
from vtrain.contract.specs import NOUNS
from vtrain.registry import discover

FOLDER = Path(__file__).parent
ENTRY_POINTS = ("builtin", "sanavideo", "wan")
"""The plugins of this repository; whatever else is installed is not documented here."""

PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def catalog() -> Catalog:
    """The parts of this repository."""
    found = discover(ENTRY_POINTS)
    return Catalog(found.parts, ())


def parts_of(found: Catalog, table: Table) -> list[Registered]:
    """The parts that `use` of a table may name."""
    return [part for name in found.names(table.kind) if (part := found.find(table.kind, name)) is not None]


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def grid(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A Markdown table."""
    heads = list(heads)
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(cell(text) for text in row)} |"


def option_rows(options: type[Options]) -> Iterator[tuple[str, ...]]:
    for option in describe(options):
        default = "required" if option.required else f"`{option.default}`" if option.default else "absent"
        meaning = option.meaning.removesuffix(REFUSED)
        yield f"`{option.key}`", option.type, default, option.limits, meaning, option.resume


HEADS = ("key", "type", "default", "limits", "meaning", "resume")


def use_row(table: Table, found: Catalog) -> tuple[str, ...]:
    default = "the family's" if table.name == "sampler" else "required"
    default = f"`{table.default}`" if table.default and not table.many else default
    names = " or ".join(f'"{part.spec.name}"' for part in parts_of(found, table)) or "none is shipped"
    return "`use`", names, default, "", f"which {NOUNS[table.kind][0]}; installed plugins add their own", table.use


def tables() -> Iterator[str]:
    """Every table of a file: core's own keys, then the options of each part of ours."""
    found = catalog()
    for table in TABLES.values():
        model = table.model
        yield f"## `{table.header}`\n"
        about = (model.__doc__ or "").strip().split(": ", 1)[-1] if model.model_fields else ""
        absent = f" A file without one gets `{table.default}`; `{table.name} = []` is none."
        parts = [part for part in parts_of(found, table) if part.spec.name == table.default and not table.many]
        lacking = any(option.required for part in parts for option in describe(part.spec.options))
        needed = "Required." if table.required or lacking else "Optional."
        yield f"{needed}{f' {about[:1].upper()}{about[1:]}' if about else ''}{absent if table.default and table.many else ''}\n"
        yield from grid(HEADS, [*([use_row(table, found)] if table.kind else []), *option_rows(model)])
        for part in parts_of(found, table):
            yield f'\n### `{table.header}` with `use = "{part.spec.name}"`\n'
            yield f"{part.spec.summary[:1].upper()}{part.spec.summary[1:]} ({part.distribution}).\n"
            options = list(option_rows(part.spec.options))
            yield from grid(HEADS, options) if options else ["It takes no options."]
        yield ""


def rules() -> Iterator[tuple[str, Option]]:
    """(dotted key, its option) of every key in every table."""
    found = catalog()
    for name, table in TABLES.items():
        if table.kind:
            yield f"{name}.use", Option("use", "", "", False, "", f"which {NOUNS[table.kind][0]}", table.use)
        for option in describe(table.model):
            yield f"{name}.{option.key}", option
        for part in parts_of(found, table):
            for option in describe(part.spec.options):
                yield f"{name}.{option.key} ({part.spec.name})", option


def rule_grid(rule: str) -> Iterator[str]:
    rows = [(f"`{key}`", option.meaning.removesuffix(REFUSED)) for key, option in rules() if option.resume == rule]
    yield from grid(("key", "meaning"), rows)


def example() -> Iterator[str]:
    """The full 2B configuration, as it lies in examples/."""
    yield "```toml"
    yield (FOLDER.parent / "examples" / "sanavideo-2b-full.toml").read_text(encoding="utf-8").rstrip()
    yield "```"


RECORDS = (StepMetrics, DatasetStatistics, Section)
"""What stands in fields of events."""

PLAIN: Mapping[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path",
    type(None): "null",
    Any: "any value",
}


def event_tables() -> Iterator[str]:
    """Every event with its fields, then the records in them."""
    yield f"There are {len(EVENTS)} kinds. A field that is `null` on the lines is None in Python; a path is text on the lines.\n"
    for kind in EVENTS.values():
        yield from record_table(kind)
    yield "Records in fields of events:\n"
    for kind in RECORDS:
        yield from record_table(kind)


def record_table(kind: type) -> Iterator[str]:
    """A heading, what it is, and a row for each field."""
    about, meanings = described(kind)
    yield f"### `{kind.__name__}`\n"
    yield f"{about}\n"
    hints = get_type_hints(kind)
    yield from grid(
        ("field", "type", "meaning"),
        ((f"`{name}`", type_words(hints[name]), meaning) for name, meaning in meanings.items()),
    )
    yield ""


def described(kind: type) -> tuple[str, dict[str, str]]:
    """What a docstring says of a record, and of each of its fields (`name: meaning`; several may share one meaning).

    Raises KeyError for a field that the docstring does not explain.
    """
    names = [each.name for each in fields(kind)]
    name = "|".join(names)
    text = re.sub(r'"([^"]*<[^"]*)"', r"`\1`", " ".join((kind.__doc__ or "").split()))
    about, *parts = re.split(rf"(?:^|(?<=[.;,]) )((?:{name})(?:, (?:{name}))*): ", text)
    said: dict[str, str] = {}
    for labels, meaning in zip(parts[::2], parts[1::2], strict=True):
        said |= dict.fromkeys(labels.split(", "), meaning.strip(" .;,"))
    return about.strip(), {each: said[each] for each in names}


def type_words(hint: Any) -> str:
    """A type as a reader of JSON lines meets it."""
    if hint in PLAIN:
        return PLAIN[hint]
    if hint in RECORDS:
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(type_words, inner))
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in inner)
    if origin in (tuple, list):
        words = type_words(inner[0])
        return f"list of ({words})" if " or " in words else f"list of {words}"
    return f"object: {type_words(inner[0])} -> {type_words(inner[1])}"


def kit() -> Iterator[str]:
    """Every class of the conformance kit with its rules, by the class that has them."""
    for name in vtrain.testing.__all__:
        whole = getattr(vtrain.testing, name)
        parts = [part for part in whole.__mro__ if any(rule.startswith("test_") for rule in vars(part))]
        yield f"## `{name}`\n"
        for part in (whole, *(part for part in parts if part is not whole)):
            about = inspect.cleandoc(part.__doc__ or "").replace("[", "\\[")
            yield f"{f'### {part.__name__}{chr(10)}{chr(10)}' if part is not whole else ''}{about}\n"
            rules = [
                (rule, inspect.getdoc(value) or "") for rule, value in vars(part).items() if rule.startswith("test_")
            ]
            if rules:
                yield from grid(
                    ("rule", "what it holds"), ((f"`{rule}`", " ".join(text.split())) for rule, text in rules)
                )
                yield ""


def planted() -> Iterator[str]:
    """Mistakes, the rule that finds each, and what it says of it, as the tests of the kit have them."""
    rows: list[tuple[str, ...]] = []
    for file in sorted((FOLDER.parent / "tests" / "testing").glob("test_*_mutants.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        rows += [(bug, f"`{rule}`", says) for bug, rule, says, _ in getattr(module, "PLANTED", ())]
    yield f"{len(rows)} mistakes.\n"
    yield from grid(("mistake", "rule", "its message has"), rows)


GENERATED: dict[str, Callable[[], Iterator[str]]] = {
    "tables": tables,
    "events": event_tables,
    "example": example,
    "kit": kit,
    "planted": planted,
    "refuse": lambda: rule_grid("refuse"),
    "tell": lambda: rule_grid("tell"),
    "free": lambda: rule_grid("free"),
}


def fresh(page: str) -> str:
    """A page with its generated parts made again. Raises KeyError for a part that nothing generates."""
    return PART.sub(lambda match: match[1] + "\n".join(GENERATED[match[2]]()).rstrip() + "\n" + match[3], page)


def main() -> None:
    for path in (FOLDER.parent / "README.md", *sorted(FOLDER.rglob("*.md"))):
        path.write_text(fresh(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
