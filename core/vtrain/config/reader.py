"""Tables of a document to records; what is wrong is collected, never raised, so that one reading finds everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from vtrain.config.document import Document
from vtrain.config.findings import Found, findings, problem, table_name
from vtrain.config.record import KeyPath, Part
from vtrain.config.wording import shown
from vtrain.contract import Catalog, Options, Registered, VtrainError
from vtrain.contract.lookup import NOUNS, listed, part_or_error

TableT = TypeVar("TableT", bound=Options)


class Reader:
    """Reads one document with one catalog. `found` grows by every problem met."""

    def __init__(self, document: Document, catalog: Catalog) -> None:
        self.document = document
        self.catalog = catalog
        self.found: list[Found] = []

    def report(self, path: KeyPath, what: str, remedy: str = "") -> None:
        self.found.append(problem(self.document, path, what, remedy))

    def raw(self, name: str) -> dict[str, Any] | None:
        """The table [name]; None if the file has none, or something else by that name (which is reported)."""
        value = self.document.tree.get(name)
        if value is None or isinstance(value, dict):
            return value
        if isinstance(value, list) and value and isinstance(value[0], dict):
            self.report((name,), f"[[{name}]] may stand only once.", f"Write [{name}], with single brackets.")
        else:
            self.report(
                (name,), f"{name}: expected a table, got {shown(value)}.", f"Write [{name}] on a line of its own."
            )
        return None

    def raws(self, name: str) -> list[dict[str, Any]]:
        """The tables [[name]]; none if the file has none, or something else by that name (which is reported)."""
        value = self.document.tree.get(name, [])
        if isinstance(value, dict):
            self.report((name,), f"[{name}] may stand several times.", f"Write [[{name}]], with double brackets.")
        elif not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.report(
                (name,), f"{name}: expected tables, got {shown(value)}.", f"Write [[{name}]] on a line of its own."
            )
        else:
            return value
        return []

    def table(self, name: str, model: type[TableT]) -> TableT | None:
        """[name] as `model`, its defaults if the file has none; None if something in it is wrong."""
        raw = self.raw(name)
        if raw is None and name in self.document.tree:
            return None
        return self.options((name,), model, raw or {})

    def options(
        self, path: KeyPath, model: type[TableT], raw: Mapping[str, Any], known: tuple[str, ...] = ()
    ) -> TableT | None:
        """The values at `path` as `model`; None if one is wrong. known: other keys of that table."""
        try:
            return model.model_validate(raw, context={"folder": self.document.folder})
        except ValidationError as error:
            self.found += findings(self.document, path, model, error, known)
            return None

    def part(
        self, path: KeyPath, kind: str, core: type[TableT], raw: Mapping[str, Any], default: str | None = None
    ) -> Part[TableT] | None:
        """A table with `use`. Its keys that core knows make `core`, all others the part's options.

        default: the part if the table names none. None if something is wrong.
        """
        own = {key: value for key, value in raw.items() if key in core.model_fields}
        table = self.options(path, core, own)
        registered = self._used(path, kind, raw.get("use", default))
        if registered is None:
            return None
        rest = {key: value for key, value in raw.items() if key not in core.model_fields and key != "use"}
        options = self.options(path, registered.spec.options, rest, ("use", *core.model_fields))
        return None if table is None or options is None else Part(registered, options, table)

    def _used(self, path: KeyPath, kind: str, use: object) -> Registered | None:
        names = f"Installed {NOUNS[kind][1]}: {listed(self.catalog.names(kind))}."
        if isinstance(use, str):
            return self.named((*path, "use"), kind, use)
        if use is None:
            self.report(path, f'{table_name(path)} lacks the key "use".', names)
        else:
            self.report(
                (*path, "use"), f"use in {table_name(path)}: expected a text in quotes, got {shown(use)}.", names
            )
        return None

    def named(self, path: KeyPath, kind: str, name: str) -> Registered | None:
        """The part called `name`; None if it cannot be used, which is reported at `path`."""
        try:
            return part_or_error(self.catalog, kind, name, "")
        except VtrainError as error:
            for each in error.problems:
                self.report(path, each.what, each.remedy)
            return None
