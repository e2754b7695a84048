"""A configuration file to a Config, with every problem found in one reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtrain.config import checks
from vtrain.config.document import Document, read
from vtrain.config.example import example_table
from vtrain.config.findings import unknown_key
from vtrain.config.reader import Reader
from vtrain.config.record import Config, NoKeys, Part
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
from vtrain.contract import Catalog, ConfigError, FamilySpec, Options

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
    checks.check_lora(reader, raw)
    part = reader.part(("model",), "family", ModelTable, raw)
    if part is None or part.table.train == "full" or part.table.lora is not None:
        return part
    return Part(part.registered, part.options, part.table.model_copy(update={"lora": LoraTable()}))


def _data(reader: Reader) -> tuple[Part[DataTable], ...]:
    raws = reader.raws("data")
    checks.check_datasets(reader, raws)
    parts = [reader.part(("data", index), "data_backend", DataTable, raw) for index, raw in enumerate(raws)]
    return tuple(part for part in parts if part is not None)


def _train(reader: Reader) -> TrainTable | None:
    raw = reader.raw("train")
    if raw is None:
        return None
    checks.check_length(reader, raw)
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
        checks.check_sampler(reader, family, default, raw.get("use"))
    if "use" not in raw and reader.named(("model", "use"), "sampler", default) is None:
        return None
    return reader.part(("sampler",), "sampler", NoKeys, raw, default)


def _schedule(reader: Reader) -> LrScheduleTable | None:
    checks.check_schedule(reader, reader.raw("lr_schedule") or {})
    return reader.table("lr_schedule", LrScheduleTable)


def _validation(reader: Reader) -> ValidationTable | None:
    raw = reader.raw("validation")
    if raw is None:
        return None
    checks.check_prompts(reader, raw)
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
