"""A configuration file to a Config: each table read and checked, with every problem found in one reading."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vtrain.config.document import Document, read
from vtrain.config.findings import (
    Found,
    example_table,
    expectation,
    fault,
    findings,
    problem,
    shown,
    unknown_key,
)
from vtrain.config.keys import KeyPath, key_text
from vtrain.config.record import TABLES, Config, NoKeys, Part, Table, TableT, recipe_of
from vtrain.config.tables import LoraTable
from vtrain.contract import Catalog, ConfigError, FamilySpec, PluginError, Problem, Registered, VtrainError
from vtrain.contract.specs import NOUNS, did_you_mean, listed, origin, part_or_error

Raw = Mapping[str, Any]


def load(path: Path, catalog: Catalog, base: Path | None = None) -> Config:
    """Read and check a file. Relative paths in it start at `base`, absent: at its folder. Raises ConfigError with every problem, in
    order of line."""
    document = read(path, base)
    reader = Reader(document, catalog)
    _top_level(reader)
    held: dict[str, Any] = {}
    for table in TABLES.values():
        held[table.field] = _SPECIAL.get(table.name, Reader.held)(reader, table)
    if reader.found:
        # A set: a table that several rules look at is reported by each of them.
        raise ConfigError(problem for _, problem in sorted(set(reader.found)))
    return Config(path=document.path, text=document.text, lines=document.lines, **held)


def minimal(catalog: Catalog, table: Table) -> str:
    """The least such table that is valid in form, with the first installed part."""
    if table.name == "train":
        return f"{table.header}\nsteps = 1000"  # steps or epochs: neither is required by itself
    if not table.kind:
        return example_table(table.header, "", table.model)
    use = next(iter(catalog.names(table.kind)), "")
    part = catalog.find(table.kind, use)
    return example_table(table.header, use or "...", *([part.spec.options] if part else []), table.model)


class Reader:
    """Reads one document with one catalog. `found` grows by every problem met: none is raised, so that all are found."""

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
            what = f"{name}: expected a table, got {shown(value)}."
            self.report((name,), what, f"Write [{name}] on a line of its own.")
        return None

    def raws(self, name: str) -> list[dict[str, Any]]:
        """The tables [[name]]; none if the file has none, or something else by that name (which is reported)."""
        value = self.document.tree.get(name, [])
        if isinstance(value, dict):
            self.report((name,), f"[{name}] may stand several times.", f"Write [[{name}]], with double brackets.")
        elif not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            what = f"{name}: expected tables, got {shown(value)}."
            self.report((name,), what, f"Write [[{name}]] on a line of its own.")
        else:
            return value
        return []

    def held(self, table: Table) -> object:
        """What Config holds of a table. None, or a shorter list, if something in it is wrong or a required one is missing."""
        if table.many:
            return self.several(table)
        raw = self.raw(table.name)
        if raw is None and (table.required or table.optional or table.name in self.document.tree):
            return None
        raw = raw or {}
        if table.name in _CHECKS:
            _CHECKS[table.name](self, raw)
        if table.kind:
            return self.part((table.name,), table, raw, table.default or None)
        return self.options((table.name,), table.model, raw)

    def several(self, table: Table) -> tuple[Part[Any], ...]:
        """The parts of [[tables]]; without one, the default part if it is installed; `tracker = []` is none."""
        if table.default and table.name not in self.document.tree:
            installed = self.catalog.find(table.kind, table.default) is not None
            read = [self.part((table.name,), table, {}, table.default)] if installed else []
        else:
            raws = self.raws(table.name)
            read = [self.part((table.name, number), table, raw) for number, raw in enumerate(raws)]
        return tuple(part for part in read if part is not None)

    def options(
        self, path: KeyPath, model: type[TableT], raw: Raw, known: tuple[str, ...] = (), whose: str = ""
    ) -> TableT | None:
        """The values at `path` as `model`; None if one is wrong. known: other keys of that table. whose: the part they are of."""
        try:
            return model.model_validate(raw, context={"folder": self.document.folder})
        except ValidationError as error:
            self.found += findings(self.document, path, model, error, known, whose)
            return None

    def part(
        self, path: KeyPath, table: Table, raw: Raw, default: str | None = None, family: Registered | None = None
    ) -> Part[Any] | None:
        """A table with `use`. Its keys that core knows are core's, all others the part's options.

        default: the part if the table names none. family: of a sampler, whose recipe gives defaults of its options. None if
        something is wrong.
        """
        core = table.model
        # Both are read even where one is wrong, so that all problems come at once.
        own = {key: value for key, value in raw.items() if key in core.model_fields}
        read = self.options(path, core, own)
        registered = self._used(path, table.kind, raw.get("use", default))
        if registered is None:
            return None
        rest = {key: value for key, value in raw.items() if key not in core.model_fields and key != "use"}
        recipe = sound_recipe(family, registered) if family else {}
        whose = f'the {NOUNS[table.kind][0]} "{registered.spec.name}" of {origin(registered)}'
        options = self.options(path, registered.spec.options, {**recipe, **rest}, ("use", *core.model_fields), whose)
        if options is not None and recipe:
            # As if they were the options' own defaults: what a sampler says of options that were given is of the file's.
            options = type(options).model_construct({*rest}, **dict(options))
        return None if read is None or options is None else Part(registered, options, read)

    def _used(self, path: KeyPath, kind: str, use: object) -> Registered | None:
        key = (*path, "use")
        if isinstance(use, str):
            return self.named(key, kind, use)
        names = f"Installed {NOUNS[kind][1]}: {listed(self.catalog.names(kind))}."
        if use is None:
            self.report(path, f"the key {key_text(key)} is missing.", names)
        else:
            self.report(key, f"{key_text(key)}: expected a text in quotes, got {shown(use)}.", names)
        return None

    def named(self, path: KeyPath, kind: str, name: str) -> Registered | None:
        """The part called `name`; None if it cannot be used, which is reported at `path`."""
        try:
            return part_or_error(self.catalog, kind, name, "")
        except VtrainError as error:
            for each in error.problems:
                self.report(path, each.what, each.remedy)
            return None


def _top_level(reader: Reader) -> None:
    """Tables that nothing knows, and required ones that are missing, each with the least that would do."""
    tree = reader.document.tree
    reader.found += [unknown_key(reader.document, (name,), list(TABLES)) for name in tree if name not in TABLES]
    for table in TABLES.values():
        if table.required and not tree.get(table.name) and not isinstance(tree.get(table.name), dict):
            remedy = f"The least it needs:\n{minimal(reader.catalog, table)}"
            reader.report((), f"the table {table.header} is missing.", remedy)


# Tables that are read with more than their own values in view.


def _model(reader: Reader, table: Table) -> object:
    """[model]; with train = "lora" it has a [model.lora], of defaults if the file has none."""
    part = reader.held(table)
    if not isinstance(part, Part) or part.table.train == "full" or part.table.lora is not None:
        return part
    return Part(part.registered, part.options, part.table.model_copy(update={"lora": LoraTable()}))


def _data(reader: Reader, table: Table) -> object:
    check_datasets(reader, reader.raws(table.name))
    return reader.several(table)


def _sampler(reader: Reader, table: Table) -> Part[NoKeys] | None:
    """[sampler], by default the family's; a family with a fixed schedule takes no other."""
    path, raw = (table.name,), reader.raw(table.name) or {}
    use = (reader.raw("model") or {}).get("use")
    family = reader.catalog.find("family", use) if isinstance(use, str) else None
    if family is None or not isinstance(family.spec, FamilySpec):
        # That the family is missing is reported already; a sampler that is named is read all the same.
        return reader.part(path, table, raw) if "use" in raw else None
    default = family.spec.sampler
    if family.spec.fixed_sampler:
        check_sampler(reader, family, default, raw.get("use"))
    if "use" not in raw and reader.named(("model", "use"), table.kind, default) is None:
        return None
    return reader.part(path, table, raw, default, family)


def sound_recipe(family: Registered, sampler: Registered) -> Mapping[str, object]:
    """`recipe_of`. Raises PluginError if the sampler does not take what the family's plugin sets."""
    recipe, name = recipe_of(family, sampler), sampler.spec.name
    faults: list[Problem] = []
    try:
        sampler.spec.options.model_validate(dict(recipe))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            key, hint = key_text(detail["loc"]), ""
            if detail["type"] == "missing":
                continue  # the file may give it
            if detail["type"] == "extra_forbidden":
                fault_text, hint = f'it has no option "{key}"', did_you_mean(key, sampler.spec.options.model_fields)
            elif wanted := expectation(detail):
                fault_text = f"{key}: expected {wanted}, got {shown(detail['input'])}"
            else:
                fault_text = f"{key}: {fault(detail)}"
            what = f'{origin(family)}: what its family "{family.spec.name}" sets of the sampler "{name}" is wrong: {fault_text}.'
            faults.append(Problem("", what, hint))
    if faults:
        raise PluginError(faults)
    return recipe


_SPECIAL: Mapping[str, Callable[[Reader, Table], object]] = {"model": _model, "data": _data, "sampler": _sampler}


# Rules between the keys of a file that no single type holds.

_FILE_NAME = re.compile(r"[^\s./\\:*?\"<>|\x00-\x1f][^/\\:*?\"<>|\x00-\x1f]{0,99}")


def check_length(reader: Reader, train: Raw) -> None:
    """[train] has exactly one of steps and epochs."""
    if "steps" in train and "epochs" in train:
        reader.report(("train", "epochs"), "[train] has both steps and epochs.", "Keep one of them.")
    elif "steps" not in train and "epochs" not in train:
        reader.report(("train",), "[train] says neither steps nor epochs.", "Add, for example: steps = 1000")


def check_lora(reader: Reader, model: Raw) -> None:
    """[model.lora] stands only where an adapter is trained."""
    if "lora" in model and model.get("train") == "full":
        remedy = 'Remove [model.lora], or set train = "lora".'
        reader.report(("model", "lora"), '[model.lora] describes an adapter, but train = "full" trains none.', remedy)


_OF_SCHEDULES = {
    "end": ("linear", "cosine", "cosine_with_restarts", "polynomial"),
    "cycles": ("cosine_with_restarts",),
    "power": ("polynomial",),
}
"""Key of [lr_schedule] -> the values of `use` with which it has a meaning."""


def check_schedule(reader: Reader, schedule: Raw) -> None:
    """`end`, `cycles` and `power` stand only where the learning rate goes by them."""
    use = schedule.get("use", "constant")
    for key, meant in _OF_SCHEDULES.items():
        if key in schedule and isinstance(use, str) and use not in meant:
            remedy = f"Remove it, or set use = {' or '.join(json.dumps(each) for each in meant)}."
            reader.report(("lr_schedule", key), f'lr_schedule.{key} has no meaning with use = "{use}".', remedy)


def check_datasets(reader: Reader, datasets: Sequence[Raw]) -> None:
    """At least one dataset is enabled, and no two share an id."""
    if datasets and all(raw.get("enabled") is False for raw in datasets):
        reader.report(("data",), "every [[data]] table has enabled = false.", "Enable one.")
    seen: dict[str, int] = {}
    for number, raw in enumerate(datasets):
        name = raw.get("id")
        if isinstance(name, str) and name in seen:
            reader.report(("data", number, "id"), f'the id "{name}" is that of data[{seen[name]}] already.')
        elif isinstance(name, str):
            seen[name] = number


def check_prompts(reader: Reader, validation: Raw) -> None:
    """Nicknames of prompts are file names that stay apart on every file system."""
    prompts = validation.get("prompts")
    seen: dict[str, str] = {}
    for name in prompts if isinstance(prompts, dict) else ():
        path = ("validation", "prompts", name)
        if not _FILE_NAME.fullmatch(name) or name.endswith((" ", ".")):
            remedy = 'It becomes one: no / \\ : * ? " < > |, no leading dot, at most 100 characters.'
            reader.report(path, f'the nickname "{name}" cannot be a file name.', remedy)
        elif name.lower() in seen:
            what = f'the nicknames "{seen[name.lower()]}" and "{name}" differ only in case.'
            reader.report(path, what, "Rename one.")
        seen[name.lower()] = name


def check_sampler(reader: Reader, family: Registered, fixed: str, use: object) -> None:
    """A family with a fixed schedule trains with its own sampler. fixed: its name."""
    if isinstance(use, str) and use != fixed:
        what = f'the family "{family.spec.name}" is trained and sampled with its own schedule, "{fixed}", and with no other.'
        reader.report(("sampler", "use"), what, f'Remove the key, or write use = "{fixed}".')


_CHECKS: Mapping[str, Callable[[Reader, Raw], None]] = {
    "model": check_lora,
    "train": check_length,
    "lr_schedule": check_schedule,
    "validation": check_prompts,
}
