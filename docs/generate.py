"""Writes the generated parts of the pages: `python docs/generate.py` after a key, a default or a part has changed.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; the rest of a page is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from vtrain.config.load import DEFAULT_OPTIMIZER, DEFAULT_TRACKER, LISTS, PARTS, REQUIRED, TABLES
from vtrain.config.schema import Option, describe
from vtrain.contract import Catalog, Options, Registered
from vtrain.contract.lookup import NOUNS
from vtrain.registry import discover

FOLDER = Path(__file__).parent
ENTRY_POINTS = ("builtin", "sanavideo")
"""The plugins of this repository; whatever else is installed is not documented here."""

REFUSED_PARTS = ("model", "sampler", "optimizer", "regularizer")
"""Tables whose `use` may not change when a run is resumed; tests/docs compares them with vtrain.train.resume."""

PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOTE = " (may not change when a run is resumed)"


def catalog() -> Catalog:
    """The parts of this repository."""
    found = discover(ENTRY_POINTS)
    return Catalog(found.parts, ())


def parts_of(found: Catalog, table: str) -> list[Registered]:
    """The parts that `use` of a table may name."""
    kind = PARTS.get(table, "")
    return [part for name in found.names(kind) if (part := found.find(kind, name)) is not None]


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
        meaning = option.meaning.removesuffix(NOTE)
        yield f"`{option.key}`", option.type, default, option.limits, meaning, option.resume


HEADS = ("key", "type", "default", "limits", "meaning", "resume")


def use_row(table: str, found: Catalog) -> tuple[str, ...]:
    default = {"optimizer": f"`{DEFAULT_OPTIMIZER}`", "sampler": "the family's"}.get(table, "required")
    names = " or ".join(f'"{part.spec.name}"' for part in parts_of(found, table)) or "none is shipped"
    rule = "refuse" if table in REFUSED_PARTS else "apply"
    return "`use`", names, default, "", f"which {NOUNS[PARTS[table]][0]}; installed plugins add their own", rule


def tables() -> Iterator[str]:
    """Every table of a file: core's own keys, then the options of each part of ours."""
    found = catalog()
    for name, model in TABLES.items():
        header = f"[[{name}]]" if name in LISTS else f"[{name}]"
        needed = "required" if name in REQUIRED else "optional"
        yield f"## `{header}`\n"
        about = (model.__doc__ or "").strip().split(": ", 1)[-1] if model.model_fields else ""
        tracker = f" A file without one gets `{DEFAULT_TRACKER}`; `tracker = []` is none." if name == "tracker" else ""
        yield f"{needed.capitalize()}.{f' {about[:1].upper()}{about[1:]}' if about else ''}{tracker}\n"
        yield from grid(HEADS, [*([use_row(name, found)] if name in PARTS else []), *option_rows(model)])
        for part in parts_of(found, name):
            yield f'\n### `{header}` with `use = "{part.spec.name}"`\n'
            yield f"{part.spec.summary[:1].upper()}{part.spec.summary[1:]} ({part.distribution}).\n"
            options = list(option_rows(part.spec.options))
            yield from grid(HEADS, options) if options else ["It takes no options."]
        yield ""


def rules() -> Iterator[tuple[str, Option]]:
    """(dotted key, its option) of every key in every table."""
    found = catalog()
    for name, model in TABLES.items():
        if name in PARTS:
            rule = "refuse" if name in REFUSED_PARTS else "apply"
            yield f"{name}.use", Option("use", "", "", False, "", f"which {NOUNS[PARTS[name]][0]}", rule)
        for option in describe(model):
            yield f"{name}.{option.key}", option
        for part in parts_of(found, name):
            for option in describe(part.spec.options):
                yield f"{name}.{option.key} ({part.spec.name})", option


def rule_grid(rule: str) -> Iterator[str]:
    rows = [(f"`{key}`", option.meaning.removesuffix(NOTE)) for key, option in rules() if option.resume == rule]
    yield from grid(("key", "meaning"), rows)


def example() -> Iterator[str]:
    """The full 2B configuration, as it lies in examples/."""
    yield "```toml"
    yield (FOLDER.parent / "examples" / "sanavideo-2b-full.toml").read_text(encoding="utf-8").rstrip()
    yield "```"


GENERATED: dict[str, Callable[[], Iterator[str]]] = {
    "tables": tables,
    "example": example,
    "refuse": lambda: rule_grid("refuse"),
    "apply": lambda: rule_grid("apply"),
}


def fresh(page: str) -> str:
    """A page with its generated parts made anew. Raises KeyError for a part that nothing generates."""
    return PART.sub(lambda match: match[1] + "\n".join(GENERATED[match[2]]()).rstrip() + "\n" + match[3], page)


def main() -> None:
    for path in (FOLDER.parent / "README.md", *sorted(FOLDER.glob("*.md"))):
        path.write_text(fresh(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
