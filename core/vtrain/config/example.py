"""The least a table needs, as TOML to copy."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.fields import FieldInfo

from vtrain.config.wording import shown
from vtrain.contract import Options

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
