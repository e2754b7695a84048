"""The typed configuration: its tables, in one list; and its values, each with its origin and its rule at a resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from vtrain.config.data_tables import DataTable
from vtrain.config.keys import KeyPath, key_text
from vtrain.config.tables import (
    CacheTable,
    CheckpointTable,
    EmaTable,
    LrScheduleTable,
    MemoryTable,
    ModelTable,
    OffloadTable,
    ParallelTable,
    PrecisionTable,
    RunTable,
    TrainTable,
    ValidationTable,
)
from vtrain.contract import FamilySpec, Options, Registered, Resume, is_location, resume_rule

TableT = TypeVar("TableT", bound=Options)
Value = str | int | float | bool | list[Any] | None
"""A value as JSON knows it, None for nothing. A table is no value: its keys are."""


class NoKeys(Options):
    """For tables in which every key but `use` is the part's own."""


@dataclass(frozen=True)
class Part(Generic[TableT]):
    """A table with `use`: the part it names, the part's options, and core's own keys of that table."""

    registered: Registered
    options: Options
    table: TableT


@dataclass(frozen=True)
class Table:
    """One table of a file. Everything that goes through the tables (reading, showing, schema, resume) goes by these.

    name: of its header, "" for that of its field. kind: of the part that `use` names, "" for a table without `use`.
    required: a file must have it. default: the part of a file that names none.
    use: what another part means at a resume. gone: what a key means there that the checkpoint has and this run has not.
    by_part: entries are told apart by the part that they name, not by their place.
    The rest is read from the field's type. field: of Config. model: core's own keys. many: it may stand several times,
    [[data]]. optional: absent it is None, not its defaults.
    """

    kind: str = ""
    name: str = ""
    required: bool = False
    default: str = ""
    use: Resume = "tell"
    gone: Resume = "tell"
    by_part: bool = False
    field: str = ""
    model: type[Options] = NoKeys
    many: bool = False
    optional: bool = False

    @property
    def header(self) -> str:
        return f"[[{self.name}]]" if self.many else f"[{self.name}]"


@dataclass(frozen=True)
class Config:
    """A whole configuration file. The fields with a `Table` are the list of all tables, in the order of the documentation.

    path: of the file; text: its words, verbatim. lines: key path -> line (1-based) of what the file says itself; a
    default has none.
    """

    path: Path
    text: str
    lines: Mapping[KeyPath, int]
    run: Annotated[RunTable, Table(required=True)]
    model: Annotated[Part[ModelTable], Table("family", required=True, use="refuse", gone="refuse")]
    precision: Annotated[PrecisionTable, Table()]
    offload: Annotated[OffloadTable, Table()]
    memory: Annotated[MemoryTable | None, Table()]
    parallel: Annotated[ParallelTable, Table()]
    data: Annotated[tuple[Part[DataTable], ...], Table("data_backend", required=True)]
    cache: Annotated[CacheTable, Table()]
    train: Annotated[TrainTable, Table(required=True)]
    sampler: Annotated[Part[NoKeys], Table("sampler", use="refuse", gone="refuse")]
    optimizer: Annotated[Part[NoKeys], Table("optimizer", default="adamw", use="refuse")]
    lr_schedule: Annotated[LrScheduleTable, Table()]
    ema: Annotated[EmaTable | None, Table()]
    validation: Annotated[ValidationTable | None, Table()]
    checkpoint: Annotated[CheckpointTable, Table()]
    regularizers: Annotated[
        tuple[Part[NoKeys], ...], Table("regularizer", "regularizer", use="refuse", gone="refuse", by_part=True)
    ]
    trackers: Annotated[tuple[Part[NoKeys], ...], Table("tracker", "tracker", default="tensorboard")]

    def held(self, table: Table) -> tuple[tuple[KeyPath, Options | Part[Any]], ...]:
        """What a table says, at its place: one entry, one for each of [[data]], or none."""
        value = vars(self)[table.field]
        if table.many:
            return tuple(((table.name, number), part) for number, part in enumerate(value))
        return () if value is None else (((table.name,), value),)

    def parts(self) -> tuple[Registered, ...]:
        """Every part that the file names for this run, once; those of [[tables]] last."""
        named = []
        for table in sorted(TABLES.values(), key=lambda table: table.many):
            for _, part in self.held(table):
                if isinstance(part, Part) and (not isinstance(part.table, DataTable) or part.table.enabled):
                    named.append(part.registered)
        return tuple({(part.spec.kind, part.spec.name): part for part in named}.values())

    def where(self, *key: str | int) -> str:
        """ "config.toml:12" of the value, or of the nearest table around it that the file has."""
        for end in range(len(key), 0, -1):
            line = self.lines.get(key[:end])
            if line is not None:
                return f"{self.path}:{line}"
        return str(self.path)


def _tables(config: type[Config]) -> Iterator[Table]:
    """The tables of a Config, by the annotations of its fields."""
    for field, hint in get_type_hints(config, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        kept, table = get_args(hint)
        many, optional = get_origin(kept) is tuple, NoneType in get_args(kept)
        entry = get_args(kept)[0] if many or optional else kept
        model = get_args(entry)[0] if get_origin(entry) is Part else entry
        yield replace(table, field=field, name=table.name or field, model=model, many=many, optional=optional)


TABLES: Mapping[str, Table] = {table.name: table for table in _tables(Config)}
"""Every table of a file by its name, in the order of the documentation."""


@dataclass(frozen=True)
class ShownValue:
    """One value. key: "data[0].video.frames"; origin: "config.toml:12", "default", "default of adamw" ...; resume: its rule.

    location: whether it says where something is.
    """

    key: str
    value: Value
    origin: str
    resume: Resume
    location: bool = False


def recipe_of(family: Registered, sampler: Registered) -> Mapping[str, object]:
    """What a family's own recipe sets of the options of its sampler; {} for another sampler."""
    spec = family.spec
    return spec.sampler_options if isinstance(spec, FamilySpec) and sampler.spec.name == spec.sampler else {}


def show(config: Config) -> tuple[ShownValue, ...]:
    """All values, table by table; an absent table is one row. Values whose type hides them (SecretStr) stay hidden."""
    rows: list[ShownValue] = []
    for table in TABLES.values():
        held = config.held(table)
        if not held:
            rows.append(ShownValue(table.name, None, _origin(config, (table.name,), "default"), table.use))
        for path, value in held:
            if isinstance(value, Part):
                rows += _part(config, path, value, table)
            else:
                rows += _options(config, path, value, "default")
    return tuple(rows)


def _part(config: Config, path: KeyPath, part: Part[Any], table: Table) -> Iterator[ShownValue]:
    name = part.registered.spec.name
    family = f"default of {config.model.registered.spec.name}"
    use = (*path, "use")
    default = "default" if table.default or table.many else family
    yield ShownValue(key_text(use), name, _origin(config, use, default), table.use)
    yield from _options(config, path, part.table, "default")
    recipe = recipe_of(config.model.registered, part.registered) if table.kind == "sampler" else {}
    yield from _options(config, path, part.options, f"default of {name}", others=dict.fromkeys(recipe, family))


def _options(
    config: Config,
    path: KeyPath,
    options: Options,
    default: str,
    within: Resume = "tell",
    others: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[ShownValue]:
    """within: the rule of the table around; what it refuses, each of its keys refuses. others: keys with another default."""
    # Both are gone through: the fields, since inner tables have rules of their own, and JSON, since that is shown.
    plain = options.model_dump(mode="json")
    for key in type(options).model_fields:
        rule = "refuse" if within == "refuse" else resume_rule(type(options), key)
        location = is_location(type(options), key)
        origin = others.get(key, default)
        yield from _value(config, (*path, key), dict(options)[key], plain[key], origin, rule, location)


def _value(
    config: Config, path: KeyPath, value: object, plain: Any, default: str, rule: Resume, location: bool
) -> Iterator[ShownValue]:
    """A value, or one row for each key where it is a table. plain: the same as JSON."""
    if isinstance(value, Options):
        yield from _options(config, path, value, default, rule)
    elif isinstance(plain, Mapping):
        for key, inner in plain.items():
            yield from _value(config, (*path, key), inner, inner, default, rule, location)
    else:
        yield ShownValue(key_text(path), plain, _origin(config, path, default), rule, location)


def _origin(config: Config, path: KeyPath, default: str) -> str:
    line = config.lines.get(path)
    return default if line is None else f"{config.path}:{line}"


def rule_when_gone(path: KeyPath) -> Resume:
    """What it means at a resume that this run has no such key and the checkpoint has."""
    table = TABLES.get(str(path[0]))
    if table is None:
        return "tell"
    return table.use if path[-1] == "use" and len(path) == 2 + table.many else table.gone
