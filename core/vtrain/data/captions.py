"""Captions of clips: from the text file beside a clip, or from the clip's own name."""

from __future__ import annotations

import codecs
import posixpath
import re
from typing import BinaryIO

from vtrain.config.tables import DataTable
from vtrain.contract import Caption, Words
from vtrain.data.sample import Left
from vtrain.data.video import FileFault, faults

SUFFIX = ".txt"
_MOST_BYTES = 1 << 20


def stem(ref_id: str) -> str:
    """The id without its suffix: what a clip and its caption file have in common."""
    return posixpath.splitext(ref_id)[0]  # not pathlib: called for every file of a dataset of any size


def from_name(ref_id: str) -> str:
    """The file's stem with "_" and "-" as spaces."""
    return " ".join(re.split(r"[\s_-]+", posixpath.basename(stem(ref_id)))).strip()


def from_file(stream: BinaryIO) -> Words:
    """The whole text, UTF-8 with or without a byte order mark, on one line; no text if it is blank. Raises FileFault."""
    with faults("its caption file cannot be read"):
        data = stream.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise FileFault(f"its caption file is larger than {_MOST_BYTES >> 20} MiB")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FileFault(f"its caption file is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    text = text.removeprefix(codecs.BOM_UTF8.decode())
    line = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return Words((line,) if line else ())


def choose(ref_id: str, beside: Words | Left | None, table: DataTable) -> tuple[Caption, ...] | Left:
    """A clip's captions under a dataset's settings, or why it has none.

    beside: what was found for it beside the clip, None if nothing was.
    """
    if table.captions == "filename":
        name = from_name(ref_id)
        words, lack = Words((name,) if name else ()), "its name has no words"
    elif beside is None:
        words, lack = Words(()), f"no caption: {SUFFIX} file of the same name is missing"
    elif isinstance(beside, Left):
        return beside
    else:
        words, lack = beside, "no caption: its caption file is empty"
    if words.texts:
        return tuple(Caption(text, words.extras) for text in words.texts)
    if table.missing_caption == "empty":
        return (Caption("", words.extras),)
    return Left("dropped", "no caption", f'{lack}; add one, or set data.missing_caption = "empty"')
