"""Captions of clips: beside a clip as text or JSON, in its name, one text for all; or of a whole dataset at once.

Those of a whole dataset come from a CSV or Parquet file, or from the data backend, in the order of its clips' ids.
"""

from __future__ import annotations

import codecs
import csv
import json
import posixpath
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from vtrain.contract import Caption, DataError, Problem, SupportsCaptions, Words
from vtrain.contract.specs import did_you_mean, listed
from vtrain.data.decoding.video import FileFault, faults
from vtrain.data.sample import Skipped
from vtrain.plan.records import CaptionsFrom, DatasetPlan

SUFFIX = ".txt"
SIDECAR = ".json"
BESIDE: Mapping[str, CaptionsFrom] = {SUFFIX: "textfile", SIDECAR: "json"}
"""Suffix of a caption file -> the setting of data.captions that reads it."""

MOTION_SCORE = "motion_score"
"""The name of a clip's motion score: in a sidecar, as a column, and in Caption.extras."""

_MOST_BYTES = 1 << 20
MOST_TEXTS = 1000
"""Captions of one clip: each is encoded."""


def stem(ref_id: str) -> str:
    """The id without its suffix: what a clip and its caption file have in common."""
    return posixpath.splitext(ref_id)[0]  # not pathlib: called for every file of a dataset of any size


def from_name(ref_id: str) -> str:
    """The file's stem with "_" and "-" as spaces."""
    return " ".join(re.split(r"[\s_-]+", posixpath.basename(stem(ref_id)))).strip()


def from_file(stream: BinaryIO) -> Words:
    """A text file: each line that is not blank is a caption. Raises FileFault."""
    return Words(_few(line.strip() for line in _text(stream).splitlines()))


def from_sidecar(stream: BinaryIO) -> Words:
    """A JSON object with "caption" (a text) or "captions" (a list of texts), and "motion_score". Raises FileFault.

    Other keys are of no interest; null is as good as absent.
    """
    try:
        data = json.loads(_text(stream))
    except json.JSONDecodeError as error:
        raise FileFault(f"its caption file is not JSON: {error.msg} (line {error.lineno})") from error
    except (RecursionError, ValueError) as error:  # ValueError: a whole number of thousands of digits
        raise FileFault("its caption file is not JSON that can be read") from error
    if not isinstance(data, dict):
        raise FileFault(f"its caption file is {_sort(data)}: write a JSON object with the key caption or captions")
    score = data.get(MOTION_SCORE)
    return Words(_few(_texts(data)), {} if score is None else {MOTION_SCORE: motion_score(score)})


def read(ref_id: str, stream: BinaryIO) -> Words:
    """A caption file, by its suffix. Raises FileFault."""
    return from_sidecar(stream) if ref_id.lower().endswith(SIDECAR) else from_file(stream)


def _text(stream: BinaryIO) -> str:
    """All of it, UTF-8 with or without a byte order mark. Raises FileFault."""
    with faults("its caption file cannot be read"):
        data = stream.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise FileFault(f"its caption file is larger than {_MOST_BYTES >> 20} MiB")
    try:
        return data.decode().removeprefix(codecs.BOM_UTF8.decode())
    except UnicodeDecodeError as error:
        raise FileFault(f"its caption file is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _few(texts: Any) -> tuple[str, ...]:
    """Those that are not blank. Raises FileFault for too many."""
    found = tuple(text for text in texts if text)
    if len(found) > MOST_TEXTS:
        raise FileFault(
            f"its caption file has {len(found)} captions, more than {MOST_TEXTS}: put a caption on one line"
        )
    return found


def _texts(data: Mapping[str, Any]) -> list[str]:
    one, several = data.get("caption"), data.get("captions")
    if one is not None and several is not None:
        raise FileFault("its caption file has both caption and captions: keep one of them")
    if one is not None and not isinstance(one, str):
        raise FileFault(f"caption in its caption file is {_sort(one)}: write a text")
    if several is not None and not (isinstance(several, list) and all(isinstance(text, str) for text in several)):
        raise FileFault(f"captions in its caption file is {_sort(several)}: write a list of texts")
    texts = [one] if isinstance(one, str) else several or []
    if any(not _encodable(text) for text in texts):
        raise FileFault("a caption in its caption file has half a character (a lone surrogate)")
    return [" ".join(text.split()) for text in texts]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sort(value: object) -> str:
    """What a JSON value is, in words; of a list, also what in it is no text."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    name = names.get(type(value), "null")
    odd = [item for item in value if not isinstance(item, str)] if isinstance(value, list) else []
    return f"{name} with {names.get(type(odd[0]), 'null')} in it" if odd else name


def motion_score(value: object) -> int:
    """A whole number from 0 on, as a number or as digits. Raises FileFault."""
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            number = float(value)
            if number >= 0 and number.is_integer():
                return int(number)
    except (ValueError, OverflowError):
        pass
    raise FileFault(f"its motion score {str(value)[:40]!r} is no whole number from 0 on: write one such as 30")


def choose(ref_id: str, found: Words | Skipped | None, dataset: DatasetPlan) -> tuple[Caption, ...] | Skipped:
    """A clip's captions under a dataset's settings, or why it has none. caption_prefix stands before each; none is empty.

    found: what its caption file, its rows or the backend say of it, None if there is nothing of the kind.
    """
    table, source = dataset.table, dataset.captions
    if source == "filename":
        name = from_name(ref_id)
        found = Words((name,) if name else ())
    elif source == "instance_prompt":
        found = Words((table.caption or "",))
    elif isinstance(found, Skipped):
        return found
    words = found or Words(())
    if words.texts:
        return tuple(Caption(table.caption_prefix + text, words.extras) for text in words.texts)
    if table.missing_caption == "empty":
        return (Caption("", words.extras),)
    lack = _lack(dataset, there=found is not None)
    return Skipped("dropped", "no caption", f'{lack}; add one, or set data.missing_caption = "empty"')


def _lack(dataset: DatasetPlan, *, there: bool) -> str:
    """there: whether the place of captions knows the clip at all."""
    match dataset.captions:
        case "filename":
            return "its name has no words"
        case "csv" | "parquet":
            name = dataset.table.captions_file.name if dataset.table.captions_file else "captions_file"
            return f"no caption: {name} has {'only an empty one for it' if there else 'no row for it'}"
        case "backend":
            return f"no caption: the data backend has {'only an empty one' if there else 'none'}"
        case "json":
            return (
                f"no caption: {'its caption file has none' if there else f'{SIDECAR} file of the same name is missing'}"
            )
        case _:
            return (
                f"no caption: {'its caption file is empty' if there else f'{SUFFIX} file of the same name is missing'}"
            )


def decides(dataset: DatasetPlan) -> list[object]:
    """What of the settings decides over captions, as JSON knows it."""
    table = dataset.table
    return [
        dataset.captions, table.caption, table.caption_prefix, table.missing_caption, str(table.captions_file),
        table.file_column, table.caption_column,
    ]  # fmt: skip


FILE_COLUMN, CAPTION_COLUMN = "file", "caption"
_ROWS = 1024
_TOLD = 20
"""Bad rows that one error names."""

CaptionRow = tuple[int, Any, Any, Any]
"""(line or number of the row, file, caption, motion score), as they stand."""


def caption_rows(dataset: DatasetPlan) -> Iterator[tuple[str, Words | FileFault]]:
    """(id of a clip, its words or why they cannot be used), sorted by id; nothing where captions stand beside the clips.

    Several rows of one clip are several captions, in the order of the file. Never all in memory. Raises DataError.
    """
    match dataset.captions:
        case "backend" if isinstance(dataset.backend, SupportsCaptions):
            for ref, words in dataset.backend.captions():
                yield ref, _sound(words)
        case "csv" | "parquet":
            assert dataset.table.captions_file is not None  # the plan saw to it
            rows = _csv if dataset.captions == "csv" else _parquet
            yield from _sorted(dataset, dataset.table.captions_file, rows(dataset, dataset.table.captions_file))


def _sound(words: Words) -> Words | FileFault:
    """A backend's words by the rules for all: no blank texts, and a motion score that is one."""
    texts = tuple(text for text in words.texts if text.strip())
    try:
        score = words.extras.get(MOTION_SCORE)
        scored = {} if score is None else {MOTION_SCORE: motion_score(score)}
    except FileFault as fault:
        return fault
    return Words(texts, {**words.extras, **scored})


def _sorted(dataset: DatasetPlan, path: Path, rows: Iterator[CaptionRow]) -> Iterator[tuple[str, Words | FileFault]]:
    """By id, sorted on disk: SQLite keeps a database without a name in a temporary file."""
    with closing(sqlite3.connect("")) as database:
        database.execute("CREATE TABLE row (ref TEXT, number INTEGER, texts TEXT, score INTEGER, fault TEXT)")
        database.executemany("INSERT INTO row VALUES (?, ?, ?, ?, ?)", _checked(dataset, path, rows))
        ordered = database.execute("SELECT ref, texts, score, fault FROM row ORDER BY ref, number")
        for ref, group in groupby(ordered, key=lambda row: str(row[0])):
            yield ref, _joined([row[1:] for row in group])


def _joined(rows: list[tuple[str, int | None, str | None]]) -> Words | FileFault:
    """All rows of one clip."""
    if fault := next((fault for _, _, fault in rows if fault), None):
        return FileFault(fault)
    scores = {score for _, score, _ in rows if score is not None}
    if len(scores) > 1:
        return FileFault(f"its rows have different motion scores ({', '.join(map(str, sorted(scores)))})")
    texts = tuple(text for row in rows for text in json.loads(row[0]))
    if len(texts) > MOST_TEXTS:
        return FileFault(f"its rows have {len(texts)} captions, more than {MOST_TEXTS}")
    return Words(texts, {MOTION_SCORE: scores.pop()} if scores else {})


def _checked(dataset: DatasetPlan, path: Path, rows: Iterator[CaptionRow]) -> Iterator[tuple[object, ...]]:
    """Rows as the database takes them. Raises DataError for rows that name no file."""
    nameless = []
    place = dataset.backend.location.rstrip("/") + "/"
    for number, file, caption, score in rows:
        if not isinstance(file, str) or not file.strip():
            nameless.append(number)
            continue
        ref = posixpath.normpath(file.strip().removeprefix(place))
        try:
            texts, fault = _cell_texts(caption), None
            whole = None if score in (None, "") else motion_score(score)
        except FileFault as error:
            texts, whole, fault = [], None, error.reason
        yield ref, number, json.dumps(texts), whole, fault
    if nameless:
        more = f", and {len(nameless) - _TOLD} more" if len(nameless) > _TOLD else ""
        numbers = ", ".join(map(str, nameless[:_TOLD])) + more
        what = f"no file is named in {'row' if len(nameless) == 1 else 'rows'} {numbers}."
        raise DataError(Problem(str(path), what, "Fill in the column of the clip's path, or remove the rows."))


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


def _csv(dataset: DatasetPlan, path: Path) -> Iterator[CaptionRow]:
    """UTF-8, a first row of names, commas (tabs in a .tsv)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            # strict: else a quote that is never closed takes the rest of the file for one cell, without an error.
            reader = csv.reader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            names = [name.strip() for name in next(reader, [])]
            file, caption = (names.index(name) for name in _columns(dataset, path, names))
            score = names.index(MOTION_SCORE) if MOTION_SCORE in names else len(names)
            for row in reader:
                if any(cell.strip() for cell in row):
                    cells = [*row, *[""] * (len(names) + 1 - len(row))]
                    yield reader.line_num, cells[file], cells[caption], cells[score].strip()
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
            columns = [*_columns(dataset, path, names), *([MOTION_SCORE] if MOTION_SCORE in names else [])]
            number = 0
            for batch in file.iter_batches(_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row[columns[0]], row[columns[1]], row.get(MOTION_SCORE)
    except pyarrow.ArrowException as error:
        raise DataError(Problem(str(path), f"not a Parquet file that can be read: {error}.")) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        Problem(str(path), f"the file cannot be read: {error}.", "Set data.captions_file to the right one.")
    )
