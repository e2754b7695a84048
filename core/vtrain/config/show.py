"""Every resolved value of a configuration, and where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vtrain.config.record import Config, KeyPath, Part
from vtrain.contract import Options

Shown = str | int | float | bool | list[Any] | None


@dataclass(frozen=True)
class Row:
    """One value. key: "data[0].video.frames"; value: as JSON knows it, None for nothing; origin: "config.toml:12", "default" ..."""

    key: str
    value: Shown
    origin: str


def show(config: Config) -> tuple[Row, ...]:
    """All values, table by table in the order of the grammar. Values whose type hides them (SecretStr) stay hidden."""
    tables: tuple[tuple[str, Options | Part[Any] | tuple[Part[Any], ...] | None], ...] = (
        ("run", config.run),
        ("model", config.model),
        ("precision", config.precision),
        ("data", config.data),
        ("cache", config.cache),
        ("train", config.train),
        ("sampler", config.sampler),
        ("optimizer", config.optimizer),
        ("lr_schedule", config.lr_schedule),
        ("validation", config.validation),
        ("checkpoint", config.checkpoint),
        ("regularizer", config.regularizers),
        ("tracker", config.trackers),
    )
    return tuple(row for name, table in tables for row in _table(config, (name,), table))


def _table(config: Config, path: KeyPath, table: Options | Part[Any] | tuple[Part[Any], ...] | None) -> Iterator[Row]:
    if isinstance(table, tuple):
        for index, part in enumerate(table):
            yield from _part(config, (*path, index), part)
        if not table:
            yield Row(_key(path), None, _origin(config, path, "default"))
    elif isinstance(table, Part):
        yield from _part(config, path, table)
    elif table is None:
        yield Row(_key(path), None, "default")
    else:
        yield from _options(config, path, table, "default")


def _part(config: Config, path: KeyPath, part: Part[Any]) -> Iterator[Row]:
    name = part.registered.spec.name
    default = f"default of {config.model.registered.spec.name}" if path == ("sampler",) else "default"
    yield Row(f"{_key(path)}.use", name, _origin(config, (*path, "use"), default))
    yield from _options(config, path, part.table, "default")
    yield from _options(config, path, part.options, f"default of {name}")


def _options(config: Config, path: KeyPath, options: Options, default: str) -> Iterator[Row]:
    plain = options.model_dump(mode="json")
    for key in type(options).model_fields:
        yield from _value(config, (*path, key), dict(options)[key], plain[key], default)


def _value(config: Config, path: KeyPath, value: object, plain: Any, default: str) -> Iterator[Row]:
    """A value, or one row for each key where it is a table. plain: the same as JSON."""
    if isinstance(value, Options):
        yield from _options(config, path, value, default)
    elif isinstance(plain, Mapping):
        for key, inner in plain.items():
            yield from _value(config, (*path, key), inner, inner, default)
    else:
        yield Row(_key(path), plain, _origin(config, path, default))


def _origin(config: Config, path: KeyPath, default: str) -> str:
    line = config.lines.get(path)
    return default if line is None else f"{config.path}:{line}"


def _key(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
