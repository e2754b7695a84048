"""pydantic's findings in plain English, with the value as it stands in the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date, time
from typing import Any

from pydantic_core import ErrorDetails

from vtrain.contract import HoldsSecret, without_secrets

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
    if sort == "value_error" and isinstance(context["error"], HoldsSecret):
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
