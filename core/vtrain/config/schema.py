"""Options as JSON Schema (draft 2020-12) of the whole file, for editors; and in words, for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.errors import PydanticInvalidForJsonSchema

from vtrain.config.findings import plain, shown
from vtrain.config.load import DEFAULT_OPTIMIZER, LISTS, PARTS, REQUIRED, TABLES
from vtrain.contract import Catalog, FamilySpec, Options, PluginError, Problem, Registered
from vtrain.contract.lookup import NOUNS, origin

Schema = dict[str, Any]

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(catalog: Catalog) -> Schema:
    """Schema of a configuration file with the parts of `catalog`. `resume` at a key says what a changed value does at a resume.

    Raises PluginError if an option's type has no JSON Schema.
    """
    shared: Schema = {}
    properties = {name: _table(catalog, name, shared) for name in TABLES}
    return {
        "$schema": DRAFT,
        "title": "vtrain configuration",
        "type": "object",
        "properties": properties,
        "required": list(REQUIRED),
        "additionalProperties": False,
        "$defs": shared,
        **_fixed_samplers(catalog),
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
            field.update({**choices[0], **field})
        elif choices:
            field["anyOf"] = choices
        if field.get("default", 0) is None or isinstance(field.get("default"), dict):
            del field["default"]  # absent; or a table, whose keys have their own
        field.pop("title", None)
        field.setdefault("resume", "apply")
        if field["resume"] == "refuse":
            field["description"] = f"{field.get('description', '')} (may not change when a run is resumed)".strip()
    return schema


def _table(catalog: Catalog, name: str, shared: Schema) -> Schema:
    core = TABLES[name]
    if name not in PARTS:
        return _closed(name, core, shared)
    kind = PARTS[name]
    names = catalog.names(kind)
    choices = [_with_part(name, core, part, shared) for each in names if (part := catalog.find(kind, each)) is not None]
    meaning = (core.__doc__ or "").strip() if core.model_fields else f"which {NOUNS[kind][0]}, and its options"
    table: Schema = {"type": "object", "description": meaning, "anyOf": choices} if choices else {"not": {}}
    if name == "model" and choices:
        table["not"] = {"required": ["lora"], "properties": {"train": {"const": "full"}}}
    if name in LISTS:
        return {"type": "array", "items": table, **({"minItems": 1} if name in REQUIRED else {})}
    return table


def _closed(name: str, model: type[Options], shared: Schema) -> Schema:
    """A table of core's own keys."""
    schema = options_schema(model, f"{name}.")
    shared.update(schema.pop("$defs"))
    if name == "train":
        schema["oneOf"] = [{"required": ["steps"]}, {"required": ["epochs"]}]
    return schema


def _with_part(name: str, core: type[Options], part: Registered, shared: Schema) -> Schema:
    """The table when `use` names this part: core's keys and the part's in one closed object, which editors complete best."""
    own, options = options_schema(core, f"{name}."), options_schema(part.spec.options, f"{name}.{part.spec.name}.")
    shared.update(own.pop("$defs") | options.pop("$defs"))
    use = {"const": part.spec.name, "description": f"{part.spec.summary} ({origin(part)})"}
    optional = name == "sampler" or (name == "optimizer" and part.spec.name == DEFAULT_OPTIMIZER)
    return {
        "type": "object",
        "title": f'{name} use = "{part.spec.name}"',
        "description": part.spec.summary,
        "properties": {"use": use, **own.get("properties", {}), **options.get("properties", {})},
        "required": [*([] if optional else ["use"]), *own.get("required", ()), *options.get("required", ())],
        "additionalProperties": False,
    }


def _fixed_samplers(catalog: Catalog) -> Schema:
    """Families that take no other sampler than their own; nothing where there is no such family."""
    rules = []
    for name in catalog.names("family"):
        part = catalog.find("family", name)
        if part is not None and isinstance(part.spec, FamilySpec) and part.spec.fixed_sampler:
            family = {"properties": {"model": {"properties": {"use": {"const": name}}}}}
            sampler = {"properties": {"sampler": {"properties": {"use": {"const": part.spec.sampler}}}}}
            rules.append({"if": family, "then": sampler})
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
    return tuple(_rows(schema, schema.get("$defs", {}), "", ()))


def _rows(schema: dict[str, Any], shared: dict[str, Any], prefix: str, above: tuple[str, ...]) -> Iterator[Option]:
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
                yield from _rows(shared[reference], shared, f"{name}.", (*above, reference))


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
