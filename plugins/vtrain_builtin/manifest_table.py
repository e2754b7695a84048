"""A manifest's columns: which there are, which are wanted, and what their cells say."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from vtrain.contract import DataError, Options, Problem, SourceRef, Words
from vtrain.contract.specs import did_you_mean, listed
from vtrain_builtin.files import NamedFiles
from vtrain_builtin.folder import sorted_rows
from vtrain_builtin.place import PlaceOptions, PlacePath, StorageError
from vtrain_builtin.rows import TableFault, rows

_TOLD = 20
"""Wrong rows that one error names."""


class ManifestColumns(Options):
    """[data.columns]: what a manifest's columns are called. "video.bytes" is the field `bytes` of the column `video`."""

    path: str | None = Field(
        None, min_length=1, description='of the path or URL; absent: "path", unless bytes is given'
    )
    bytes: str | None = Field(None, min_length=1, description="of the file's own bytes, in Parquet; instead of path")
    caption: str = Field("caption", min_length=1, description="of the caption: a text, or a list of texts")
    extras: dict[str, str] = Field(
        {},
        description="of what the model family reads of a clip beside its caption, by its name there; absent: a column of "
        "that name, if there is one",
    )
    id: str | None = Field(None, min_length=1, description="of the clip's name; absent: its path, or its row's number")


class ManifestOptions(PlaceOptions):
    """Options of the "manifest" backend."""

    names_urls: ClassVar[bool] = True

    path: PlacePath = Field(
        min_length=1,
        description='a .csv, .tsv, .jsonl or .parquet file, a pattern such as "part-*.parquet", or a folder of them; '
        "local, or a URL of fsspec; a relative path starts at the configuration file",
    )
    columns: ManifestColumns = Field(ManifestColumns(), description="what its columns are called")
    suffix: str = Field(
        ".mp4",
        pattern=r"^\.[A-Za-z0-9]+$",
        description="with a bytes column: the suffix of the rows' names, which tells what their bytes are",
    )

    @model_validator(mode="after")
    def _where_bytes_stand(self) -> Self:
        columns = self.columns
        if columns.bytes and columns.path:
            raise ValueError("columns names a column of paths and one of bytes: give either")
        if columns.bytes and self.path.lower().endswith((".csv", ".tsv", ".jsonl", ".ndjson")):
            raise ValueError("columns.bytes: bytes stand in .parquet files alone")
        return self


def manifest_location(options: ManifestOptions, files: NamedFiles) -> str:
    """The place, and what of the columns is not as by default: it decides over ids and captions too."""
    chosen = options.columns.model_dump(exclude_defaults=True)
    if options.columns.bytes and options.suffix != ".mp4":
        chosen["suffix"] = options.suffix
    chosen |= {f"extras.{name}": column for name, column in chosen.pop("extras", {}).items()}
    words = "&".join(f"{option}={column}" for option, column in chosen.items())
    return f"{files.location}#{words}" if words else files.location


@dataclass(frozen=True)
class Record:
    """A row of a manifest. place: the manifest, for messages; number: the row's line, or number; cells: by option."""

    table: SourceRef
    place: str
    number: int
    cells: Mapping[str, Any]


class Tables:
    """A manifest's files as one stream of rows.

    passes_over: files that are not there or damaged are passed over, because they are told elsewhere.
    """

    def __init__(self, files: NamedFiles, *, passes_over: bool = False) -> None:
        self.files, self._passes_over = files, passes_over

    def records(self, needed: Mapping[str, str], optional: Mapping[str, str] | None = None) -> Iterator[Record]:
        """needed, optional: option -> column. Raises DataError."""
        for table in self.files.refs():
            if self._passes_over and table.version == "missing":
                continue
            try:
                yield from self.of(table, needed, optional or {})
            except TableFault:
                if not self._passes_over:
                    raise
            except StorageError as error:
                raise error.at(self.place(table), "the manifest cannot be read") from error.__cause__
            except OSError as error:
                what = f"the manifest cannot be read: {error.strerror or error}."
                raise DataError(Problem(self.place(table), what, "Set data.path to the right file.")) from error

    def of(self, table: SourceRef, needed: Mapping[str, str], optional: Mapping[str, str]) -> Iterator[Record]:
        """The rows of one file. Raises DataError and OSError."""
        place = self.place(table)
        keys = list(needed)

        def choose(names: Sequence[str], complete: bool) -> Sequence[str]:
            _check(place, needed, names)
            keys.extend(option for option, name in optional.items() if name in names or not complete)
            return [needed.get(key) or optional[key] for key in keys]

        if table.version == "missing":
            raise FileNotFoundError(2, "there is no such file")
        with self.files.folder.open(table) as file:
            at_once = 1 if "bytes" in needed else 1024  # a row's bytes are a whole clip
            for number, cells in rows(file, place, choose, at_once):
                yield Record(table, place, number, dict(zip(keys, cells, strict=True)))

    def place(self, table: SourceRef) -> str:
        return f"{self.files.folder.location}/{table.id}"


def _check(place: str, needed: Mapping[str, str], names: Sequence[str]) -> None:
    """Raises DataError for columns that are not there, or there twice."""
    problems = []
    for option, name in needed.items():
        if names.count(name) != 1:
            what = f'there is no column "{name}".' if name not in names else f'the column "{name}" is there twice.'
            near = did_you_mean(name, names)
            remedy = f"{near} Set data.columns.{option} to one of its columns: {listed(set(names))}.".strip()
            problems.append(Problem(place, what, remedy))
    if problems:
        raise DataError(problems)


class WrongRows:
    """Collects what is wrong, so that it is told all at once."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []
        self._more = 0

    def add(self, place: str, what: str, remedy: str) -> None:
        if len(self._problems) < _TOLD:
            self._problems.append(Problem(place, what, remedy))
        else:
            self._more += 1

    def stop(self) -> None:
        """Raises DataError if there was anything."""
        if self._more:
            self._problems.append(Problem("", f"{self._more:,} more rows are wrong."))
        if self._problems:
            raise DataError(self._problems)


@dataclass(frozen=True)
class NamedBy:
    """How rows are named. columns: option -> column that a name needs. name: a record's id; None if it has none."""

    columns: Mapping[str, str]
    name: Callable[[Record], str | None]


def clip_name(value: Any, suffix: str) -> str | None:
    """A cell of the id column as an id that ends in `suffix`; None if it is none."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    name = posixpath.normpath(str(value).strip().strip("/"))
    if name in (".", "") or ".." in name.split("/"):
        return None
    return name if name.lower().endswith(suffix.lower()) else name + suffix


def caption_texts(value: Any) -> tuple[str, ...] | None:
    """A cell of the caption column, lines joined; None if it is no text and no list of texts."""
    cells = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(cell, str) for cell in cells):
        return None
    return tuple(text for text in (" ".join(cell.split()) for cell in cells) if text)


def captions_of(
    columns: ManifestColumns, tables: Tables, named: NamedBy, extras: Sequence[str]
) -> Iterator[tuple[str, Words]]:
    """(clip's id, its words) by id: of all its rows, captions in order, none twice. Raises DataError.

    named: columns that an id is made of, and the id of a record, or None for a record that has none. extras: that are asked
    for; those that the options name come in any case.
    """
    wrong = WrongRows()
    mark = "extras."  # no option is called so
    needed = {**named.columns, "caption": columns.caption}
    needed |= {f"{mark}{name}": column for name, column in columns.extras.items()}
    optional = {f"{mark}{name}": name for name in extras if name not in columns.extras}
    records = tables.records(needed, optional)
    for name, same in groupby(sorted_rows(_words(records, named, wrong, mark)), key=itemgetter(0)):
        rows = [json.loads(row) for _, row in same]
        values: dict[str, Any] = {}
        for _, given, _ in rows:
            for extra, value in given.items():
                if _plain(values.setdefault(extra, value)) != _plain(value):
                    what = f'the rows of "{name}" differ in {extra}: {values[extra]} and {value}.'
                    wrong.add(tables.files.location, what, "Give the clip one.")
        texts = tuple(dict.fromkeys(text for several, _, _ in rows for text in several))
        where = next((place for _, given, place in rows if given), "")
        if texts or values:
            yield name, Words(texts, values, where)
    wrong.stop()


def _plain(value: Any) -> Any:
    """Numbers are the same in digits, too."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _words(records: Iterator[Record], named: NamedBy, wrong: WrongRows, mark: str) -> Iterator[tuple[str, str]]:
    """(id; texts, extras and their place as JSON). Raises DataError after the last record if some were wrong."""
    for record in records:
        name, where = named.name(record), f"{record.place}:{record.number}"
        texts = caption_texts(record.cells["caption"])
        if texts is None:
            wrong.add(where, "the caption is no text and no list of texts.", "Fix the row.")
            continue
        if name is not None:
            cells = record.cells.items()
            given = {
                key.removeprefix(mark): cell for key, cell in cells if key.startswith(mark) and cell not in (None, "")
            }
            yield name, json.dumps([texts, given, where if given else ""], default=str)
    wrong.stop()
