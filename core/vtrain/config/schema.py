"""Options as JSON Schema (draft 2020-12) of the whole file, for editors; and in words, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic_core import to_jsonable_python

from vtrain.config.findings import plain, shown
from vtrain.config.record import TABLES, Table
from vtrain.contract import Catalog, FamilySpec, Options, PluginError, Problem, Registered, Resume
from vtrain.contract.specs import NOUNS, origin

Schema = dict[str, Any]

REFUSED = " (may not change when a run is resumed)"
"""Ends the description of an option that a resumed run refuses, for editors, which do not show `resume`."""

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(catalog: Catalog) -> Schema:
    """Schema of a configuration file with the parts of `catalog`. `resume` at a key: what another value means at a resume;
    a table that refuses another value refuses it for each of its keys.

    Raises PluginError if an option's type has no JSON Schema.
    """
    shared: Schema = {}
    properties = {name: _table(catalog, table, shared) for name, table in TABLES.items()}
    return {
        "$schema": DRAFT,
        "title": "vtrain configuration",
        "type": "object",
        "properties": properties,
        "required": [table.name for table in TABLES.values() if table.required],
        "additionalProperties": False,
        "$defs": shared,
        **_samplers_of_families(catalog),
    }


def options_schema(options: type[Options], prefix: str = "") -> Schema:
    """Schema of one model, without null (TOML has none), with the resume rule of every key. prefix: of the names in $defs."""
    try:
        schema = options.model_json_schema(ref_template=f"#/$defs/{prefix}{{model}}")
    except PydanticInvalidForJsonSchema as error:
        what = f"{options.__module__}.{options.__qualname__} has a type that JSON Schema cannot describe: {error}"
        raise PluginError(Problem("", what, "Give the field a WithJsonSchema annotation.")) from None
    schema["$defs"] = {f"{prefix}{name}": _plain(table) for name, table in schema.get("$defs", {}).items()}
    return _plain(schema)


def _plain(schema: Schema) -> Schema:
    """One table's schema as a TOML file sees it."""
    for field in schema.get("properties", {}).values():
        choices = [choice for choice in field.get("anyOf", ()) if choice != {"type": "null"}]
        if len(choices) == 1:
            del field["anyOf"]
            field.update({**choices[0], **field})  # the field's own words win
        elif choices:
            field["anyOf"] = choices
        if field.get("default", 0) is None or isinstance(field.get("default"), dict):
            del field["default"]  # absent; or a table, whose keys have their own
        field.pop("title", None)
        field.setdefault("resume", "tell")
        if field["resume"] == "refuse":
            field["description"] = f"{field.get('description', '')}{REFUSED}".strip()
    return schema


def _table(catalog: Catalog, table: Table, shared: Schema) -> Schema:
    if not table.kind:
        return _closed(table, shared)
    found = [catalog.find(table.kind, name) for name in catalog.names(table.kind)]
    families = tuple(_families(catalog))
    choices = [_with_part(table, part, shared, families) for part in found if part is not None]
    own = table.model
    meaning = (own.__doc__ or "").strip() if own.model_fields else f"which {NOUNS[table.kind][0]}, and its options"
    schema: Schema = {"type": "object", "description": meaning, "anyOf": choices} if choices else {"not": {}}
    if table.name == "model" and choices:
        schema["not"] = {"required": ["lora"], "properties": {"train": {"const": "full"}}}
    if table.many:
        return {"type": "array", "items": schema, **({"minItems": 1} if table.required else {})}
    return schema


def _closed(table: Table, shared: Schema) -> Schema:
    """A table of core's own keys."""
    schema = options_schema(table.model, f"{table.name}.")
    shared.update(schema.pop("$defs"))
    if table.name == "train":
        schema["oneOf"] = [{"required": ["steps"]}, {"required": ["epochs"]}]
    return schema


def _with_part(table: Table, part: Registered, shared: Schema, families: Sequence[FamilySpec]) -> Schema:
    """The table when `use` names this part: core's keys and the part's in one closed object, which editors complete best."""
    name, spec = table.name, part.spec
    own, options = options_schema(table.model, f"{name}."), options_schema(spec.options, f"{name}.{spec.name}.")
    shared.update(own.pop("$defs") | options.pop("$defs"))
    use = {"const": spec.name, "description": f"{spec.summary} ({origin(part)})", "resume": table.use}
    optional = name == "sampler" or (spec.name == table.default and not table.many)
    # What some family sets of its sampler need not stand in the file; for another family the loader asks for it.
    by_family = {
        key
        for family in families
        if name == "sampler" and family.sampler == spec.name
        for key in family.sampler_options
    }
    needed = [key for key in options.get("required", ()) if key not in by_family]
    return {
        "type": "object",
        "title": f'{name} use = "{spec.name}"',
        "description": spec.summary,
        "properties": {"use": use, **own.get("properties", {}), **options.get("properties", {})},
        "required": [*([] if optional else ["use"]), *own.get("required", ()), *needed],
        "additionalProperties": False,
    }


def _families(catalog: Catalog) -> Iterator[FamilySpec]:
    for name in catalog.names("family"):
        part = catalog.find("family", name)
        if part is not None and isinstance(part.spec, FamilySpec):
            yield part.spec


def _samplers_of_families(catalog: Catalog) -> Schema:
    """Families that take no other sampler than their own, and what they set of its options; nothing where there are none."""
    rules = []
    for family in _families(catalog):
        own: Schema = {"properties": {"use": {"const": family.sampler}}}
        named: Schema = {"properties": {"model": {"properties": {"use": {"const": family.name}}}}}
        if family.fixed_sampler:
            rules.append({"if": named, "then": {"properties": {"sampler": own}}})
        if family.sampler_options:
            recipe = {key: {"default": to_jsonable_python(value)} for key, value in family.sampler_options.items()}
            with_own = {"properties": {**named["properties"], "sampler": own}}
            rules.append({"if": with_own, "then": {"properties": {"sampler": {"properties": recipe}}}})
    return {"allOf": rules} if rules else {}


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
    """One option. key: dotted below its table; default: as TOML writes it, "" for none; resume: its rule."""

    key: str
    type: str
    default: str
    required: bool
    limits: str
    meaning: str
    resume: Resume


def describe(options: type[Options]) -> tuple[Option, ...]:
    """All options in the order of their definition, a table's own below it.

    Raises PluginError if a type has no JSON Schema.
    """
    schema = options_schema(options)
    return tuple(_rows(schema, schema.get("$defs", {}), "", (), "tell"))


def _rows(schema: Schema, shared: Schema, prefix: str, above: tuple[str, ...], within: Resume) -> Iterator[Option]:
    """above: shared tables around this one, so that a table within itself ends. within: the rule of the table around."""
    for key, field in schema.get("properties", {}).items():
        name, meaning = f"{prefix}{key}", field.get("description", "")
        default = shown(field["default"], 200) if field.get("default") is not None else ""
        required, limits = key in schema.get("required", ()), ", ".join(_limits(field, shared))
        rule: Resume = "refuse" if within == "refuse" else field["resume"]
        yield Option(name, _type(field, shared), default, required, limits, meaning, rule)
        for reference in _references(field):
            if reference not in above:
                yield from _rows(shared[reference], shared, f"{name}.", (*above, reference), rule)


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
