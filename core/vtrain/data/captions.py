"""Captions of clips: from the text file beside a clip, or from the clip's own name."""

from __future__ import annotations

import codecs
import posixpath
import re
from typing import BinaryIO

from vtrain.data.video import FileFault, faults

SUFFIX = ".txt"
_MOST_BYTES = 1 << 20


def stem(ref_id: str) -> str:
    """The id without its suffix: what a clip and its caption file have in common."""
    return posixpath.splitext(ref_id)[0]  # not pathlib: called for every file of a dataset of any size


def from_name(ref_id: str) -> str:
    """The file's stem with "_" and "-" as spaces."""
    return " ".join(re.split(r"[\s_-]+", posixpath.basename(stem(ref_id)))).strip()


def from_file(stream: BinaryIO) -> str:
    """The whole text, UTF-8 with or without a byte order mark, on one line. Raises FileFault."""
    with faults("its caption file cannot be read"):
        data = stream.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise FileFault(f"its caption file is larger than {_MOST_BYTES >> 20} MiB")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FileFault(f"its caption file is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    text = text.removeprefix(codecs.BOM_UTF8.decode())
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
