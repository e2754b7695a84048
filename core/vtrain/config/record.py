"""The typed configuration: what a file says, each table validated, and where each value stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from vtrain.config.tables import (
    CacheTable,
    CheckpointTable,
    DataTable,
    LrScheduleTable,
    ModelTable,
    PrecisionTable,
    RunTable,
    TrainTable,
    ValidationTable,
)
from vtrain.contract import Options, Registered

KeyPath = tuple[str | int, ...]
"""A value's place in the file: ("data", 0, "video", "frames")."""

TableT = TypeVar("TableT", bound=Options)


class NoKeys(Options):
    """For tables in which every key but `use` is the part's own."""


@dataclass(frozen=True)
class Part(Generic[TableT]):
    """A table with `use`: the part it names, the part's options, and core's own keys of that table."""

    registered: Registered
    options: Options
    table: TableT


@dataclass(frozen=True)
class Config:
    """A whole configuration file.

    path: of the file; text: its words, verbatim. lines: key path -> line (1-based) of what the file says itself; a
    default has none.
    """

    path: Path
    text: str
    lines: Mapping[KeyPath, int]
    run: RunTable
    model: Part[ModelTable]
    precision: PrecisionTable
    data: tuple[Part[DataTable], ...]
    cache: CacheTable
    train: TrainTable
    sampler: Part[NoKeys]
    optimizer: Part[NoKeys]
    lr_schedule: LrScheduleTable
    validation: ValidationTable | None
    checkpoint: CheckpointTable
    regularizers: tuple[Part[NoKeys], ...]
    trackers: tuple[Part[NoKeys], ...]

    def parts(self) -> tuple[Registered, ...]:
        """Every part that the file names for this run, once."""
        single = (self.model, self.sampler, self.optimizer)
        named = [part.registered for part in single] + [part.registered for part in self.data if part.table.enabled]
        named += [part.registered for part in (*self.regularizers, *self.trackers)]
        return tuple({(part.spec.kind, part.spec.name): part for part in named}.values())

    def where(self, *key: str | int) -> str:
        """ "config.toml:12" of the value, or of the nearest table around it that the file has."""
        for end in range(len(key), 0, -1):
            line = self.lines.get(key[:end])
            if line is not None:
                return f"{self.path}:{line}"
        return str(self.path)
