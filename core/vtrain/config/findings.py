"""What a table gets wrong, in plain English: pydantic's errors as problems with places, and the least that would do, to copy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, time
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from vtrain.config.document import Document
from vtrain.config.keys import ON_PURPOSE, KeyPath, key_text, removed, renamed
from vtrain.contract import HoldsControlCharacter, HoldsSecret, Options, Problem, without_secrets
from vtrain.contract.specs import did_you_mean, listed

Found = tuple[int, Problem]
"""A line, for the order of the report (0: none), and the problem."""


def problem(document: Document, path: KeyPath, what: str, remedy: str = "") -> Found:
    """A problem at a key path, or at the nearest table around it that the file has."""
    line = document.line(path)
    where = f"{document.path}:{line}" if line else str(document.path)
    return line, Problem(where, what, remedy)


def findings(
    document: Document,
    path: KeyPath,
    model: type[Options],
    error: ValidationError,
    known: Sequence[str] = (),
    whose: str = "",
) -> list[Found]:
    """Problems of the table at `path`. known: further keys that the table takes, for the did-you-mean. whose: the part that a
    missing key is an option of, "" for core's own."""
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        groups.setdefault(_place(document.tree, path, detail), []).append(detail)
    # A union reports each of its branches: what is wrong deepest is of the branch that was meant.
    deepest = [
        place
        for place in groups
        if not any(len(other) > len(place) and other[: len(place)] == place for other in groups)
    ]
    return [_finding(document, path, place, groups[place], model, known, whose) for place in deepest]


def _place(tree: Mapping[str, Any], path: KeyPath, detail: ErrorDetails) -> KeyPath:
    """Where an error stands in the file: pydantic's location without the names it gives to branches of a union."""
    value: Any = tree
    for key in path:
        value = _child(value, key)
    place = path
    for key in detail["loc"]:
        inner = _child(value, key)
        if inner is not None:
            value, place = inner, (*place, key)
    return (*place, detail["loc"][-1]) if detail["type"] == "missing" else place


def _child(value: Any, key: str | int) -> Any:
    if isinstance(value, Mapping):
        return value.get(str(key))
    return value[key] if isinstance(value, list) and isinstance(key, int) and key < len(value) else None


def _finding(
    document: Document,
    table: KeyPath,
    place: KeyPath,
    details: list[ErrorDetails],
    model: type[Options],
    known: Sequence[str],
    whose: str,
) -> Found:
    detail = details[0]
    owner = fields_at(model, place[len(table) : -1])
    if detail["type"] == "extra_forbidden":
        return unknown_key(document, place, sorted({*owner, *(known if len(place) == len(table) + 1 else ())}))
    if detail["type"] == "missing":
        field = owner.get(str(place[-1]))
        needed = [f"{whose[:1].upper()}{whose[1:]} needs it."] if whose else []
        example = [f"Add, for example: {example_line(field, str(place[-1]))}"] if field else []
        return problem(document, place[:-1], f"the key {key_text(place)} is missing.", " ".join((*needed, *example)))
    expected = list(dict.fromkeys(text for text in map(expectation, details) if text))
    texts = list(dict.fromkeys(fault(each) for each in details if not expectation(each)))
    if expected:
        texts.insert(0, f"expected {' or '.join(expected)}, got {shown(detail['input'])}")
    return problem(document, place, f"{key_text(place)}: {'; or '.join(texts)}.", _hint(place, detail))


def _hint(place: KeyPath, detail: ErrorDetails) -> str:
    if detail["type"] == "literal_error":
        return did_you_mean(str(detail["input"]), _choices(detail))
    error = detail.get("ctx", {}).get("error")
    if not isinstance(error, HoldsControlCharacter):
        return ""
    key = "" if isinstance(place[-1], int) else f"{key_text(place[-1:])} = "
    words = "Single quotes keep backslashes" if error.literal.startswith("'") else "Write each backslash twice"
    return f"{words}: {key}{error.literal}"


def unknown_key(document: Document, place: KeyPath, keys: Sequence[str]) -> Found:
    """A key that its table does not take. keys: those it does. For one that was renamed or removed, what became of it."""
    if (found := renamed(place)) is not None:
        return problem(document, place, f"{key_text(place)} was renamed to {key_text(found[0])}.", found[1].remedy)
    if (gone := removed(place)) is not None:
        return problem(document, place, f"there is no {key_text(place)} any more.", gone.remedy)
    if (why := ON_PURPOSE.get(str(place[-1]))) is not None:
        return problem(document, place, f"there is no {key_text(place)}.", why)
    remedy = did_you_mean(str(place[-1]), keys) or (f"It takes {listed(keys)}." if keys else "It takes no keys.")
    return problem(document, place, f"unknown key {key_text(place)}.", remedy)


def _choices(detail: ErrorDetails) -> list[str]:
    words = str(detail["ctx"]["expected"]).replace(" or ", ", ").split(", ")
    return [word.strip("'") for word in words]


def fields_at(model: type[BaseModel], keys: KeyPath) -> Mapping[str, Any]:
    """The fields of the table `keys` below a model: name -> FieldInfo; empty where no model stands there."""
    for key in keys:
        if isinstance(key, int):
            continue
        field = model.model_fields.get(key)
        inner = nested(field.annotation) if field else None
        if inner is None:
            return {}
        model = inner
    return model.model_fields


def nested(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as `LoraTable | None` or `tuple[Stage, ...]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, Annotated, tuple, list):
        return next((found for inner in get_args(annotation) if (found := nested(inner)) is not None), None)
    return None


_BY_TYPE = {"string": '"..."', "boolean": "true", "array": "[]", "object": "{}"}


def example_line(field: FieldInfo, key: str) -> str:
    """'steps = 1' for a field: its own example, its first choice or its lower limit, else something of its type."""
    if field.examples:
        return f"{key} = {shown(field.examples[0])}"
    try:
        schema = TypeAdapter(_annotated(field)).json_schema()
    except PydanticInvalidForJsonSchema:
        return f"{key} = ..."
    return f"{key} = {_value(schema)}"


def _annotated(field: FieldInfo) -> Any:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _value(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return _value(schema["anyOf"][0])
    for key in ("examples", "enum"):
        if schema.get(key):
            return shown(schema[key][0])
    kind = schema.get("type", "string")
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0 if kind == "integer" else 0.0))
        return shown(low + 1 if "exclusiveMinimum" in schema or (kind == "integer" and low == 0) else low)
    return _BY_TYPE.get(str(kind), "...")


def example_table(header: str, use: str, *models: type[Options]) -> str:
    """The least table of these models that is valid in form: its header, `use` if not "", and every required key."""
    lines = [header] + ([f'use = "{use}"'] if use else [])
    for model in models:
        lines += [example_line(field, key) for key, field in model.model_fields.items() if field.is_required()]
    return "\n".join(lines)


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text in quotes",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a table",
    "mapping_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dataclass_type": "a table",
}
_LIMITS = {
    "greater_than": ("gt", "greater than {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "at most {}"),
    "multiple_of": ("multiple_of", "a multiple of {}"),
}


def expectation(error: ErrorDetails) -> str:
    """The type that was expected, "a whole number"; "" if the error is of another sort."""
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"]).replace("'", '"')
    return _EXPECTED.get(error["type"], "")


def fault(error: ErrorDetails) -> str:
    """What is wrong with a value, the value shown; for errors that are not about its type."""
    sort, context = error["type"], error.get("ctx", {})
    # Without the value, which is the secret, or stands in the remedy.
    if sort == "value_error" and isinstance(context["error"], HoldsSecret | HoldsControlCharacter):
        return str(context["error"])
    value = shown(error["input"])
    if sort in _LIMITS:
        key, words = _LIMITS[sort]
        return f"must be {words.format(plain(context[key]))}, got {value}"
    if sort == "finite_number":
        return f"must be a finite number, got {value}"
    if sort == "value_error":
        return f"{context['error']}; got {value}"
    return _length(error) or f"{error['msg'][:1].lower()}{error['msg'][1:]}; got {value}"


def plain(number: float) -> str:
    """A limit without a needless ".0"."""
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)


def _length(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] in ("string_too_short", "too_short") and context["min_length"] == 1:
        return "must not be empty"
    if error["type"] in ("string_too_short", "string_too_long"):
        limit = context.get("min_length", context.get("max_length"))
        words = "at least" if "min_length" in context else "at most"
        return f"must have {words} {limit} characters, got {len(error['input'])}"
    if error["type"] in ("too_short", "too_long"):
        limit = context.get("min_length", context.get("max_length"))
        words = "at least" if error["type"] == "too_short" else "at most"
        return f"must have {words} {limit} entries, got {context.get('actual_length')}"
    return ""


def shown(value: object, limit: int = 60) -> str:
    """A value roughly as TOML writes it, URLs without their secrets, cut to `limit` characters."""
    text = _written(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(without_secrets(value), ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_written(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_written(item) for item in value) + "]"
    return value.isoformat() if isinstance(value, date | time) else str(value)
