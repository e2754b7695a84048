"""Captions of a whole dataset at once, in the order of its clips' ids: from a CSV or Parquet file, or from the data backend."""

from __future__ import annotations

import csv
import json
import posixpath
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from vtrain.contract import DataError, Problem, SupportsCaptions, Words
from vtrain.contract.specs import did_you_mean, listed
from vtrain.data.decoding.video import FileFault
from vtrain.data.scanning.captions import MOST_TEXTS
from vtrain.data.scanning.extras import Strangers, asked_for, own_extras
from vtrain.plan.records import DatasetPlan

FILE_COLUMN, CAPTION_COLUMN = "file", "caption"
_ROWS = 1024
_LONGEST_HEADER = 1 << 16
_TOLD = 20
"""Bad rows that one error names."""

CaptionRow = tuple[int, Any, Any, dict[str, Any]]
"""(line or number of the row, file, caption, extras), as they stand."""


def caption_rows(dataset: DatasetPlan) -> Iterator[tuple[str, Words | FileFault]]:
    """(id of a clip, its words or why they cannot be used), sorted by id; nothing where captions stand beside the clips.

    Several rows of one clip are several captions, in the order of the file. Never all in memory. Raises DataError.
    """
    match dataset.captions:
        case "backend" if isinstance(dataset.backend, SupportsCaptions):
            strangers = Strangers(dataset)
            for ref, words in dataset.backend.captions(asked_for(dataset)):
                strangers.look(words)
                texts = tuple(text for text in words.texts if text.strip())
                yield ref, own_extras(replace(words, texts=texts), dataset)
            if found := strangers.problems():
                raise DataError(found)
        case "csv" | "parquet":
            assert dataset.table.captions_file is not None  # the plan saw to it
            rows = _csv if dataset.captions == "csv" else _parquet
            yield from _sorted(dataset, dataset.table.captions_file, rows(dataset, dataset.table.captions_file))


def _sorted(dataset: DatasetPlan, path: Path, rows: Iterator[CaptionRow]) -> Iterator[tuple[str, Words | FileFault]]:
    """By id, sorted on disk: SQLite keeps a database without a name in a temporary file."""
    with closing(sqlite3.connect("")) as database:
        database.execute("CREATE TABLE row (ref TEXT, number INTEGER, texts TEXT, extras TEXT, fault TEXT)")
        database.executemany("INSERT INTO row VALUES (?, ?, ?, ?, ?)", _checked(dataset, path, rows))
        ordered = database.execute("SELECT ref, texts, extras, fault FROM row ORDER BY ref, number")
        for ref, group in groupby(ordered, key=lambda row: str(row[0])):
            yield ref, _joined([row[1:] for row in group])


def _joined(rows: list[tuple[str, str, str | None]]) -> Words | FileFault:
    """All rows of one clip."""
    if fault := next((fault for _, _, fault in rows if fault), None):
        return FileFault(fault)
    extras: dict[str, object] = {}
    for _, packed, _ in rows:
        for name, value in json.loads(packed).items():
            if extras.setdefault(name, value) != value:
                return FileFault(f"its rows differ in {name} ({extras[name]}, {value})")
    texts = tuple(text for row in rows for text in json.loads(row[0]))
    if len(texts) > MOST_TEXTS:
        return FileFault(f"its rows have {len(texts)} captions, more than {MOST_TEXTS}")
    return Words(texts, extras)


def _checked(dataset: DatasetPlan, path: Path, rows: Iterator[CaptionRow]) -> Iterator[tuple[object, ...]]:
    """Rows as the database takes them. Raises DataError for rows that name no file, and extras that the family does not read."""
    nameless, strangers = [], Strangers(dataset)
    place = dataset.backend.location.rstrip("/") + "/"
    for number, file, caption, given in rows:
        if not isinstance(file, str) or not file.strip():
            nameless.append(number)
            continue
        ref = posixpath.normpath(file.strip().removeprefix(place))
        row = Words((), given, f"{path.name}:{number}")
        strangers.look(replace(row, where=f"{path}:{number}"))
        try:
            texts, read = _cell_texts(caption), own_extras(row, dataset)
        except FileFault as error:
            texts, read = [], error
        if isinstance(read, FileFault):
            yield ref, number, "[]", "{}", read.reason
        else:
            yield ref, number, json.dumps(texts), json.dumps(dict(read.extras)), None
    problems = strangers.problems()
    if nameless:
        more = f", and {len(nameless) - _TOLD} more" if len(nameless) > _TOLD else ""
        numbers = ", ".join(map(str, nameless[:_TOLD])) + more
        what = f"no file is named in {'row' if len(nameless) == 1 else 'rows'} {numbers}."
        problems.insert(0, Problem(str(path), what, "Fill in the column of the clip's path, or remove the rows."))
    if problems:
        raise DataError(problems)


def _cell_texts(caption: object) -> list[str]:
    """The captions in a cell: a text, or a list of texts (Parquet). Raises FileFault."""
    cells: list[Any] = [] if caption is None else caption if isinstance(caption, list) else [caption]
    if odd := [cell for cell in cells if not isinstance(cell, str)]:
        raise FileFault(f"its caption {str(odd[0])[:40]!r} is no text")
    return [text for text in (" ".join(cell.split()) for cell in cells) if text]


def _columns(dataset: DatasetPlan, path: Path, names: list[str]) -> tuple[str, str]:
    """The columns of file and caption. Raises DataError if the file lacks one."""
    table = dataset.table
    wanted = {
        "file_column": table.file_column or FILE_COLUMN,
        "caption_column": table.caption_column or CAPTION_COLUMN,
    }
    problems = []
    for key, name in wanted.items():
        if name not in names:
            near = did_you_mean(name, names)
            remedy = f"{near} " if near else ""
            words = f"{remedy}Set data.{key} to one of its columns: {listed(names)}." if names else "It has no columns."
            problems.append(Problem(str(path), f'there is no column "{name}".', words))
        elif names.count(name) > 1:
            problems.append(
                Problem(str(path), f'the column "{name}" is there {names.count(name)} times.', "Rename one.")
            )
    if problems:
        raise DataError(problems)
    return wanted["file_column"], wanted["caption_column"]


def _delimiter(header: str, path: Path, wanted: set[str]) -> str:
    """By the first row alone: a comma (a tab in a .tsv), or what gives the wanted names, or else the most names."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    delimiters = (usual, ";", "\t", ",", "|")
    for delimiter in delimiters:
        if wanted <= {name.strip().strip('"') for name in header.split(delimiter)}:
            return delimiter
    return usual if usual in header else max(delimiters, key=header.count)


def _csv(dataset: DatasetPlan, path: Path) -> Iterator[CaptionRow]:
    """UTF-8, a first row of names, commas (tabs in a .tsv), or what else its first row is separated by."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            wanted = {dataset.table.file_column or FILE_COLUMN, dataset.table.caption_column or CAPTION_COLUMN}
            delimiter = _delimiter(stream.readline(_LONGEST_HEADER), path, wanted)
            stream.seek(0)
            # strict: else a quote that is never closed takes the rest of the file for one cell, without an error.
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            names = [name.strip() for name in next(reader, [])]
            file, caption = (names.index(name) for name in _columns(dataset, path, names))
            extras = {name: names.index(name) for name in asked_for(dataset) if name in names}
            for row in reader:
                if any(cell.strip() for cell in row):
                    cells = [*row, *[""] * (len(names) - len(row))]
                    given = {name: cells[at].strip() for name, at in extras.items()}
                    yield reader.line_num, cells[file], cells[caption], given
    except UnicodeDecodeError as error:
        raise DataError(Problem(str(path), f"the file is not UTF-8 ({error.reason}).", "Save it as UTF-8.")) from error
    except csv.Error as error:
        raise DataError(Problem(f"{path}:{reader.line_num}", f"not CSV: {error}.", "Fix the line.")) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _parquet(dataset: DatasetPlan, path: Path) -> Iterator[CaptionRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            named, caption = _columns(dataset, path, names)
            extras = [name for name in asked_for(dataset) if name in names]
            number = 0
            for batch in file.iter_batches(_ROWS, columns=list(dict.fromkeys((named, caption, *extras)))):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row[named], row[caption], {name: row[name] for name in extras}
    except pyarrow.ArrowException as error:
        raise DataError(Problem(str(path), f"not a Parquet file that can be read: {error}.")) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        Problem(str(path), f"the file cannot be read: {error}.", "Set data.captions_file to the right one.")
    )
