"""What a table gets wrong: pydantic's errors as problems with places, one for each value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vtrain.config.document import Document
from vtrain.config.example import example_line
from vtrain.config.record import KeyPath
from vtrain.config.wording import expectation, fault, shown
from vtrain.contract import Options, Problem
from vtrain.contract.lookup import did_you_mean, listed

Found = tuple[int, Problem]
"""A line, for the order of the report (0: none), and the problem."""


def table_name(path: KeyPath) -> str:
    """ "[data.video]" of ("data", 0, "video"); "[[data]] number 1" of ("data", 0)."""
    if path and isinstance(path[-1], int):
        return f"[[{'.'.join(str(key) for key in path[:-1])}]] number {path[-1] + 1}"
    return f"[{'.'.join(str(key) for key in path if isinstance(key, str))}]" if path else "the file"


def problem(document: Document, path: KeyPath, what: str, remedy: str = "") -> Found:
    """A problem at a key path, or at the nearest table around it that the file has."""
    line = document.line(path)
    where = f"{document.path}:{line}" if line else str(document.path)
    return line, Problem(where, what, remedy)


def findings(
    document: Document, path: KeyPath, model: type[Options], error: ValidationError, known: Sequence[str] = ()
) -> list[Found]:
    """Problems of the table at `path`. known: further keys that the table takes, for the did-you-mean."""
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        groups.setdefault(_place(document.tree, path, detail), []).append(detail)
    deepest = [
        place
        for place in groups
        if not any(len(other) > len(place) and other[: len(place)] == place for other in groups)
    ]
    return [_finding(document, path, place, groups[place], model, known) for place in deepest]


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
) -> Found:
    detail = details[0]
    inside, key = table_name(place[:-1]), place[-1] if place else ""
    if detail["type"] == "extra_forbidden":
        owner = fields_at(model, place[len(table) : -1])
        keys = sorted({*owner, *(known if len(place) == len(table) + 1 else ())})
        return unknown_key(document, place, keys)
    if detail["type"] == "missing":
        owner = fields_at(model, place[len(table) : -1])
        line = example_line(owner[str(key)], str(key)) if str(key) in owner else ""
        return problem(
            document, place[:-1], f'{inside} lacks the key "{key}".', f"Add, for example: {line}" if line else ""
        )
    expected = list(dict.fromkeys(text for text in map(expectation, details) if text))
    texts = list(dict.fromkeys(fault(each) for each in details if not expectation(each)))
    if expected:
        texts.insert(0, f"expected {' or '.join(expected)}, got {shown(detail['input'])}")
    hint = did_you_mean(str(detail["input"]), _choices(detail)) if detail["type"] == "literal_error" else ""
    return problem(document, place, f"{_named(place, table)}: {'; or '.join(texts)}.", hint)


def unknown_key(document: Document, place: KeyPath, keys: Sequence[str]) -> Found:
    """A key that its table does not take. keys: those it does."""
    remedy = did_you_mean(str(place[-1]), keys) or (f"It takes {listed(keys)}." if keys else "It takes no keys.")
    return problem(document, place, f'unknown key "{place[-1]}" in {table_name(place[:-1])}.', remedy)


def _named(place: KeyPath, table: KeyPath) -> str:
    """ "steps in [train]", "resolution, entry 2, in [[data]] number 1", or the table itself."""
    if place == table:
        return table_name(table)
    end = next(at for at in range(len(place), 0, -1) if isinstance(place[at - 1], str))
    entries = "".join(f", entry {int(key) + 1}," for key in place[end:])
    return f"{place[end - 1]}{entries} in {table_name(place[: end - 1])}"


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
