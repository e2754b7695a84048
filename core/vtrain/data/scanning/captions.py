"""Captions of clips: beside a clip as text or JSON, in its name, or one text for all; and which a dataset's settings choose."""

from __future__ import annotations

import codecs
import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, BinaryIO

from vtrain.contract import Caption, Words
from vtrain.data.decoding.video import FileFault, faults
from vtrain.data.sample import Skipped
from vtrain.data.scanning.extras import declared, encodable, raw
from vtrain.plan.records import CaptionsFrom, DatasetPlan

SUFFIX = ".txt"
SIDECAR = ".json"
BESIDE: Mapping[str, CaptionsFrom] = {SUFFIX: "textfile", SIDECAR: "json"}
"""Suffix of a caption file -> the setting of data.captions that reads it."""

_TEXTS = ("caption", "captions")

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
    """A text file: its lines, and "" where blank ones stand between two. Raises FileFault."""
    lines = [line.strip() for line in _text(stream).splitlines()]
    return Words(
        tuple(line for before, line in pairwise(("", *lines, "")) if line or before)[:-1] if any(lines) else ()
    )


def from_sidecar(stream: BinaryIO) -> Words:
    """A JSON object with "caption" (a text) or "captions" (a list of texts). Raises FileFault.

    Other keys are extras, as they stand; null is as good as absent.
    """
    try:
        data = json.loads(_text(stream))
    except json.JSONDecodeError as error:
        raise FileFault(f"its caption file is not JSON: {error.msg} (line {error.lineno})") from error
    except (RecursionError, ValueError) as error:  # ValueError: a whole number of thousands of digits
        raise FileFault("its caption file is not JSON that can be read") from error
    if not isinstance(data, dict):
        raise FileFault(f"its caption file is {_sort(data)}: write a JSON object with the key caption or captions")
    return Words(tuple(text for text in _texts(data) if text), raw(data, _TEXTS))


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


def _texts(data: Mapping[str, Any]) -> list[str]:
    one, several = data.get("caption"), data.get("captions")
    if one is not None and several is not None:
        raise FileFault("its caption file has both caption and captions: keep one of them")
    if one is not None and not isinstance(one, str):
        raise FileFault(f"caption in its caption file is {_sort(one)}: write a text")
    if several is not None and not (isinstance(several, list) and all(isinstance(text, str) for text in several)):
        raise FileFault(f"captions in its caption file is {_sort(several)}: write a list of texts")
    texts = [one] if isinstance(one, str) else several or []
    if any(not encodable(text) for text in texts):
        raise FileFault("a caption in its caption file has half a character (a lone surrogate)")
    return [" ".join(text.split()) for text in texts]


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


def choose(ref_id: str, found: Words | Skipped | None, dataset: DatasetPlan) -> tuple[Caption, ...] | Skipped:
    """A clip's captions under a dataset's settings, or why it has none. caption_prefix stands before each; none is empty.

    found: what its caption file, its rows or the backend say of it, with the family's extras; None if there is nothing of the
    kind.
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
    extras: Any = words.extras  # which `own_extras` has looked at
    texts = [text for text in words.texts if text]
    if source == "textfile" and table.caption_per == "file":
        texts = [" ".join(" ".join(texts).split())] if texts else []
    if len(texts) > MOST_TEXTS:
        return Skipped("dropped", "bad caption", _too_many(dataset, len(texts)))
    if texts:
        return tuple(Caption(table.caption_prefix + text, extras) for text in texts)
    if table.missing_caption == "empty":
        return (Caption("", extras),)
    lack = _lack(dataset, there=found is not None)
    return Skipped("dropped", "no caption", f'{lack}; add one, or set data.missing_caption = "empty"')


def _too_many(dataset: DatasetPlan, count: int) -> str:
    """Found in one file, or in the rows of one clip."""
    match dataset.captions:
        case "textfile":
            remedy = 'put a caption on one line, or set data.caption_per = "file" for one caption of all lines'
        case "json":
            remedy = "keep fewer"
        case _:
            return f"it has {count} captions, more than {MOST_TEXTS}: keep fewer"
    return f"its caption file has {count} captions, more than {MOST_TEXTS}: {remedy}"


PROSE, JSON = "prose", "json"
"""What the lines of a caption file look like that are probably no captions of their own."""

_LONG = 120
"""Letters of a line that is more than a short caption."""


def looks_like(lines: Sequence[str], dataset: DatasetPlan) -> str:
    """PROSE or JSON, where each line of a text file is a caption because nobody said so; else "".

    lines: of the file, as `from_file` gives them. Prose runs on from one line to the next, or is long, in paragraphs.
    """
    if dataset.captions != "textfile" or dataset.table.caption_per is not None or not lines:
        return ""
    if lines[0][0] in "{[" and lines[-1][-1] in "}]" and _is_json("\n".join(lines)):
        return JSON
    runs_on = any(_runs_on(*pair) for pair in pairwise(lines))
    long = [line for line in lines if len(line) >= _LONG]
    paragraphs = len(long) > 1 and ("" in lines or all(_sentences(line) > 1 for line in long))
    return PROSE if runs_on or paragraphs else ""


def _is_json(text: str) -> bool:
    """Whether it is an object or a list."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (RecursionError, ValueError):
        return False


def _runs_on(line: str, following: str) -> bool:
    """Whether a sentence goes on in the next line."""
    return len(line) >= _LONG // 3 and line[-1] not in ".!?\"'”’)…。" and following[:1].islower()


def _sentences(line: str) -> int:
    return len(re.findall(r"[.!?…](?:\s|$)", line))


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
        table.file_column, table.caption_column, table.caption_per, declared(dataset),
    ]  # fmt: skip
