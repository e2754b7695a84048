"""The settings of a run, every value by its key, and how those of a checkpoint differ from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeGuard

from vtrain.config.keys import ADDED, KeyPath, as_called_now, key_path, key_text, removed
from vtrain.config.record import TABLES, Config, Value, rule_when_gone, show
from vtrain.contract import Resume
from vtrain.plan.precision import base_of
from vtrain.plan.records import Plan


@dataclass(frozen=True)
class Setting:
    """A resolved value of the configuration, and what another one means at a resume. location: it says where something is."""

    value: Value
    resume: Resume
    location: bool = False


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was: None where it was, or is, not there."""

    key: str
    old: object
    new: Value
    resume: Resume
    location: bool = False

    def __str__(self) -> str:
        return f"changed since the checkpoint: {self.key}: {shown(self.old)} -> {shown(self.new)}"


def settings(plan: Plan) -> dict[str, Setting]:
    """Every value by its key, with its resume rule; what the file leaves open is as the plan resolved it."""
    found = declared(plan.config)
    for path, value in _resolved(plan).items():
        found[key_text(path)] = replace(found[key_text(path)], value=value)
    return found | {"processes": Setting(plan.processes, "tell")}


def declared(config: Config) -> dict[str, Setting]:
    """Every value of the file or its default, with its resume rule; None where the plan decides."""
    return {row.key: Setting(row.value, row.resume, row.location) for row in show(config) if row.key not in TABLES}


def _resolved(plan: Plan) -> dict[KeyPath, Value]:
    values: dict[KeyPath, Value] = {("precision", "base"): plan.base}
    lora = plan.config.model.table.lora
    if lora is not None:
        # As it is used, so that a default that somebody writes out later is no change.
        values["model", "lora", "alpha"] = lora.alpha or float(lora.rank)
    enabled = [number for number, part in enumerate(plan.config.data) if part.table.enabled]
    for number, dataset in zip(enabled, plan.datasets, strict=True):
        values["data", number, "id"] = dataset.id
        values["data", number, "resolution"] = [str(size) for size in dataset.sizes]
        values["data", number, "video", "frames"] = dataset.frames
        values["data", number, "video", "min_frames"] = dataset.min_frames
        values["data", number, "video", "fps"] = dataset.fps
    made = plan.validation
    if made is not None:
        values["validation", "size"] = str(made.size)
        values["validation", "frames"] = made.shape.frames
        values["validation", "fps"] = made.fps
    return values


def compare(old: Mapping[str, object], new: Mapping[str, Setting]) -> list[Change]:
    """All that differs, in the order of the keys. A key that only one side has counts as None.

    old: as a checkpoint has them, also one that was written when keys had other names or were written otherwise.
    """
    before = _as_written_now(old, new)
    changes = []
    for key in sorted({*before, *new}):
        setting = new.get(key) or Setting(None, rule_when_gone(key_path(key)))
        was = before.get(key)
        if was != setting.value and not (setting.location and _same_place(was, setting.value)):
            changes.append(Change(key, was, setting.value, setting.resume, setting.location))
    return changes


def _same_place(old: object, new: object) -> bool:
    return is_path(old) and is_path(new) and os.path.realpath(old) == os.path.realpath(new)


def is_path(value: object) -> TypeGuard[str]:
    """Whether it is a place on this machine, as options have it: no hub id and no URL."""
    return isinstance(value, str) and Path(value).is_absolute() and "\0" not in value


def counted_once(changes: Sequence[Change], config: Config) -> list[Change]:
    """Without those that come with another of them, and go when it is set back: alpha with rank, options with their part."""
    found = {key_path(change.key): change for change in changes}
    return [change for path, change in found.items() if not _comes_along(path, change, found, config)]


def _comes_along(path: KeyPath, change: Change, others: Mapping[KeyPath, Change], config: Config) -> bool:
    def counts(parent: KeyPath) -> bool:
        """Whether it has changed, and is reported as strictly."""
        return parent != path and parent in others and others[parent].resume in ("refuse", change.resume)

    # Keys that one side does not have. Of changes that are taken all are told: an error is corrected, a notice only read.
    above = ("model", "train") if path[:2] == ("model", "lora") else _use(path)
    if change.resume == "refuse" and None in (change.old, change.new) and counts(above):
        return True
    if path in config.lines:
        return False
    if path[0] == "sampler" and counts(("model", "use")):  # the family's own
        return True
    for child, source, derive in _DERIVED:
        parent = (*path[: -len(child)], *source)
        if path[-len(child) :] == child and counts(parent) and others[parent].old is not None:
            return derive(others[parent].old) == change.old
    return False


def _use(path: KeyPath) -> KeyPath:
    """The key of the part that an option is of."""
    return (*path[: 2 if len(path) > 1 and isinstance(path[1], int) else 1], "use")


_DERIVED: tuple[tuple[KeyPath, KeyPath, Callable[[Any], object]], ...] = (
    (("model", "lora", "alpha"), ("model", "lora", "rank"), float),
    (("precision", "base"), ("model", "train"), base_of),
    (("video", "min_frames"), ("video", "frames"), lambda frames: frames),
    (("id",), ("path",), lambda path: Path(path).name),
)
"""What the plan makes of another key where the file does not say it: key, the other key, how."""


def _as_written_now(old: Mapping[str, object], new: Mapping[str, Setting]) -> dict[str, object]:
    """Settings of a checkpoint under the keys of today: renamed ones, removed ones, tables of free keys, which were one value
    each, and parts of a list told apart by their name: they are compared with the entry that names the same part."""
    values: dict[KeyPath, object] = {}
    for key, value in old.items():
        values |= _leaves(as_called_now(key_path(key)), value)
    values = {path: value for path, value in values.items() if key_text(path) in new or not _says_nothing(path, value)}
    tables = {path[:-1] for path in values}
    values = {**{path: value for path, value in ADDED.items() if path[:-1] in tables}, **values}
    for table in TABLES.values():
        if table.by_part:
            numbers = _numbers(table.name, values, new)
            values = {_numbered(path, table.name, numbers): value for path, value in values.items()}
    return {key_text(path): value for path, value in values.items()}


def _says_nothing(path: KeyPath, value: object) -> bool:
    """Whether it is of a key that there is no more, at the value that it has everywhere now."""
    gone = removed(path)
    return gone is not None and gone.meant == value


def _leaves(path: KeyPath, value: object) -> dict[KeyPath, object]:
    """A value, or each of a table's."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {at: inner for key, each in value.items() for at, inner in _leaves((*path, key), each).items()}


def _numbers(table: str, old: Mapping[KeyPath, object], new: Mapping[str, Setting]) -> dict[str | int, int]:
    """What stands for an entry in a checkpoint's keys -> the entry's number in this run, a new one for an entry that is gone.

    It stands there as its number then, or, in checkpoints before those, as the name of its part.
    """
    paths = {path: setting.value for key, setting in new.items() if _names_part(path := key_path(key), table)}
    now = {part: int(path[1]) for path, part in paths.items()}
    gone = count(len(now))
    return {
        path[1]: now[str(part)] if str(part) in now else next(gone)
        for path, part in old.items()
        if _names_part(path, table)
    }


def _names_part(path: KeyPath, table: str) -> bool:
    """Whether a key is the `use` of an entry of [[table]]."""
    return len(path) == 3 and path[0] == table and path[2] == "use"


def _numbered(path: KeyPath, table: str, numbers: Mapping[str | int, int]) -> KeyPath:
    within = len(path) > 1 and path[0] == table and path[1] in numbers
    return (table, numbers[path[1]], *path[2:]) if within else path


def shown(value: object) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)
