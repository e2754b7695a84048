"""A configuration file to a Config: each table read and checked, with every problem found in one reading."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vtrain.config.document import Document, read
from vtrain.config.findings import Found, example_table, findings, problem, shown, table_name, unknown_key
from vtrain.config.record import Config, KeyPath, NoKeys, Part
from vtrain.config.tables import (
    CacheTable,
    CheckpointTable,
    DataTable,
    LoraTable,
    LrScheduleTable,
    ModelTable,
    PrecisionTable,
    RunTable,
    TrainTable,
    ValidationTable,
)
from vtrain.contract import Catalog, ConfigError, FamilySpec, Options, Registered, VtrainError
from vtrain.contract.lookup import NOUNS, listed, part_or_error

TABLES: dict[str, type[Options]] = {
    "run": RunTable,
    "model": ModelTable,
    "precision": PrecisionTable,
    "data": DataTable,
    "cache": CacheTable,
    "train": TrainTable,
    "sampler": NoKeys,
    "optimizer": NoKeys,
    "lr_schedule": LrScheduleTable,
    "validation": ValidationTable,
    "checkpoint": CheckpointTable,
    "regularizer": NoKeys,
    "tracker": NoKeys,
}
"""Every table of a file, in the order of the documentation, and core's own keys of it."""

PARTS = {
    "model": "family",
    "data": "data_backend",
    "sampler": "sampler",
    "optimizer": "optimizer",
    "regularizer": "regularizer",
    "tracker": "tracker",
}
"""Tables with `use`, and the kind of part it names."""

LISTS = ("data", "regularizer", "tracker")
"""Tables that may stand several times: [[data]]."""

REQUIRED = ("run", "model", "data", "train")
DEFAULT_OPTIMIZER = "adamw"
DEFAULT_TRACKER = "tensorboard"


def load(path: Path, catalog: Catalog) -> Config:
    """Read and check a file. Relative paths in it start at its folder. Raises ConfigError with every problem, in order of line."""
    document = read(path)
    reader = Reader(document, catalog)
    config = _config(reader, document)
    if config is None or reader.found:
        raise ConfigError(problem for _, problem in sorted(set(reader.found)))
    return config


def _config(reader: Reader, document: Document) -> Config | None:
    """The whole file; None where a table is wrong, which the reader has noted then."""
    _top_level(reader)
    run = reader.table("run", RunTable) if "run" in document.tree else None
    model = _model(reader)
    precision = reader.table("precision", PrecisionTable)
    data = _data(reader)
    cache = reader.table("cache", CacheTable)
    train = _train(reader)
    sampler = _sampler(reader)
    optimizer = reader.part(("optimizer",), "optimizer", NoKeys, reader.raw("optimizer") or {}, DEFAULT_OPTIMIZER)
    schedule = _schedule(reader)
    validation = _validation(reader)
    checkpoint = reader.table("checkpoint", CheckpointTable)
    regularizers = _parts(reader, "regularizer")
    trackers = _trackers(reader)
    if run is None or model is None or precision is None or cache is None or train is None or sampler is None:
        return None
    if optimizer is None or schedule is None or checkpoint is None:
        return None
    return Config(
        document.path, document.text, document.lines, run, model, precision, data, cache, train, sampler, optimizer,
        schedule, validation, checkpoint, regularizers, trackers,
    )  # fmt: skip


def _top_level(reader: Reader) -> None:
    """Tables that nothing knows, and required ones that are missing, each with the least that would do."""
    tree = reader.document.tree
    reader.found += [unknown_key(reader.document, (key,), list(TABLES)) for key in tree if key not in TABLES]
    for name in REQUIRED:
        if not tree.get(name) and not isinstance(tree.get(name), dict):
            header = f"[[{name}]]" if name in LISTS else f"[{name}]"
            reader.report(
                (), f"the table {header} is missing.", f"The least it needs:\n{minimal(reader.catalog, name)}"
            )


def minimal(catalog: Catalog, name: str) -> str:
    """The least table [name] that is valid in form, with the first installed part."""
    header = f"[[{name}]]" if name in LISTS else f"[{name}]"
    if name == "train":
        return f"{header}\nsteps = 1000"
    if name not in PARTS:
        return example_table(header, "", TABLES[name])
    use = next(iter(catalog.names(PARTS[name])), "")
    part = catalog.find(PARTS[name], use)
    return example_table(header, use or "...", *([part.spec.options] if part else []), TABLES[name])


def _model(reader: Reader) -> Part[ModelTable] | None:
    raw = reader.raw("model")
    if raw is None:
        return None
    check_lora(reader, raw)
    part = reader.part(("model",), "family", ModelTable, raw)
    if part is None or part.table.train == "full" or part.table.lora is not None:
        return part
    return Part(part.registered, part.options, part.table.model_copy(update={"lora": LoraTable()}))


def _data(reader: Reader) -> tuple[Part[DataTable], ...]:
    raws = reader.raws("data")
    check_datasets(reader, raws)
    parts = [reader.part(("data", index), "data_backend", DataTable, raw) for index, raw in enumerate(raws)]
    return tuple(part for part in parts if part is not None)


def _train(reader: Reader) -> TrainTable | None:
    raw = reader.raw("train")
    if raw is None:
        return None
    check_length(reader, raw)
    return reader.options(("train",), TrainTable, raw)


def _sampler(reader: Reader) -> Part[NoKeys] | None:
    """[sampler], by default the family's; a family with a fixed schedule takes no other."""
    raw = reader.raw("sampler") or {}
    use = (reader.raw("model") or {}).get("use")
    family = reader.catalog.find("family", use) if isinstance(use, str) else None
    if family is None or not isinstance(family.spec, FamilySpec):
        # That the family is missing is reported already; a sampler that is named is read all the same.
        return reader.part(("sampler",), "sampler", NoKeys, raw) if "use" in raw else None
    default = family.spec.sampler
    if family.spec.fixed_sampler:
        check_sampler(reader, family, default, raw.get("use"))
    if "use" not in raw and reader.named(("model", "use"), "sampler", default) is None:
        return None
    return reader.part(("sampler",), "sampler", NoKeys, raw, default)


def _schedule(reader: Reader) -> LrScheduleTable | None:
    check_schedule(reader, reader.raw("lr_schedule") or {})
    return reader.table("lr_schedule", LrScheduleTable)


def _validation(reader: Reader) -> ValidationTable | None:
    raw = reader.raw("validation")
    if raw is None:
        return None
    check_prompts(reader, raw)
    return reader.options(("validation",), ValidationTable, raw)


def _parts(reader: Reader, name: str) -> tuple[Part[NoKeys], ...]:
    raws: list[dict[str, Any]] = reader.raws(name)
    parts = [reader.part((name, index), PARTS[name], NoKeys, raw) for index, raw in enumerate(raws)]
    return tuple(part for part in parts if part is not None)


def _trackers(reader: Reader) -> tuple[Part[NoKeys], ...]:
    """[[tracker]]; a file without one gets the default tracker if it is installed, `tracker = []` none."""
    if "tracker" in reader.document.tree or reader.catalog.find("tracker", DEFAULT_TRACKER) is None:
        return _parts(reader, "tracker")
    part = reader.part(("tracker",), "tracker", NoKeys, {}, DEFAULT_TRACKER)
    return () if part is None else (part,)


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


Raw = Mapping[str, Any]

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


def check_schedule(reader: Reader, schedule: Raw) -> None:
    """`end` stands only where the learning rate goes somewhere."""
    if "end" in schedule and schedule.get("use", "constant") == "constant":
        remedy = 'Remove it, or set use = "linear" or "cosine".'
        reader.report(("lr_schedule", "end"), 'end has no meaning in [lr_schedule] with use = "constant".', remedy)


def check_datasets(reader: Reader, datasets: Sequence[Raw]) -> None:
    """At least one dataset is enabled, and no two share an id."""
    if datasets and all(raw.get("enabled") is False for raw in datasets):
        reader.report(("data",), "every [[data]] table has enabled = false.", "Enable one.")
    seen: dict[str, int] = {}
    for index, raw in enumerate(datasets):
        name = raw.get("id")
        if isinstance(name, str) and name in seen:
            reader.report(
                ("data", index, "id"), f'the id "{name}" is that of [[data]] number {seen[name] + 1} already.'
            )
        elif isinstance(name, str):
            seen[name] = index


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
            reader.report(
                path, f'the nicknames "{seen[name.lower()]}" and "{name}" differ only in case.', "Rename one."
            )
        seen[name.lower()] = name


def check_sampler(reader: Reader, family: Registered, fixed: str, use: object) -> None:
    """A family with a fixed schedule trains with its own sampler. fixed: its name."""
    if isinstance(use, str) and use != fixed:
        what = f'the family "{family.spec.name}" is trained and sampled with its own schedule, "{fixed}", and with no other.'
        reader.report(("sampler", "use"), what, f'Remove the key, or write use = "{fixed}".')
