"""A part's options in words: type, default, limits and meaning of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vtrain.config.schema import options_schema
from vtrain.config.wording import plain, shown
from vtrain.contract import Options

_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "array": "list",
    "object": "table",
    "null": "absent",
}
_LIMITS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minLength": "length >= {}",
    "maxLength": "length <= {}",
    "minItems": "at least {} entries",
    "maxItems": "at most {} entries",
    "minProperties": "at least {} keys",
    "multipleOf": "a multiple of {}",
}


@dataclass(frozen=True)
class Option:
    """One option. key: dotted below its table; default: as TOML writes it, "" for none; resume: "apply" or "refuse"."""

    key: str
    type: str
    default: str
    required: bool
    limits: str
    meaning: str
    resume: str


def describe(options: type[Options]) -> tuple[Option, ...]:
    """All options in the order of their definition, a table's own below it.

    Raises PluginError if a type has no JSON Schema.
    """
    schema = options_schema(options)
    return tuple(_table(schema, schema.get("$defs", {}), "", ()))


def _table(schema: dict[str, Any], shared: dict[str, Any], prefix: str, above: tuple[str, ...]) -> Iterator[Option]:
    """above: shared tables around this one, so that a table within itself ends."""
    for key, field in schema.get("properties", {}).items():
        name = f"{prefix}{key}"
        default = shown(field["default"], 200) if field.get("default") is not None else ""
        required = key in schema.get("required", ())
        limits = ", ".join(_limits(field, shared))
        yield Option(
            name, _type(field, shared), default, required, limits, field.get("description", ""), field["resume"]
        )
        for reference in _references(field):
            if reference not in above:
                yield from _table(shared[reference], shared, f"{name}.", (*above, reference))


def _references(field: dict[str, Any]) -> Iterator[str]:
    """Names of the tables a field holds."""
    if "$ref" in field:
        yield field["$ref"].rsplit("/", 1)[-1]
    for inner in [*field.get("anyOf", ()), *field.get("allOf", ())]:
        yield from _references(inner)
    if isinstance(field.get("items"), dict):
        yield from _references(field["items"])


def _type(field: dict[str, Any], shared: dict[str, Any]) -> str:
    if "$ref" in field:
        return _type(shared[field["$ref"].rsplit("/", 1)[-1]], shared)
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(inner, shared) for inner in field["anyOf"]))
    if "enum" in field or "const" in field:
        return " or ".join(shown(value) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array" and isinstance(field.get("items"), dict):
        return f"list of {_type(field['items'], shared)}"
    if field.get("examples"):
        return f"{_plain_type(field)}, such as {shown(field['examples'][0])}"
    return _plain_type(field)


def _plain_type(field: dict[str, Any]) -> str:
    return _TYPES.get(str(field.get("type")), "any value")


def _limits(field: dict[str, Any], shared: dict[str, Any]) -> Iterator[str]:
    for key, words in _LIMITS.items():
        if key in field:
            yield words.format(plain(field[key]))
    for inner in field.get("anyOf", ()):
        yield from _limits(inner, shared)
