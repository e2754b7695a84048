"""What a backend lists, told apart by name: videos, captions, and files that are neither."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from vtrain.contract import DataBackend, SourceRef
from vtrain.data import captions
from vtrain.data.sample import Left
from vtrain.data.video import SUFFIXES


@dataclass(frozen=True)
class Listing:
    """The files of a dataset, hidden ones skipped. captions: stem -> its caption file. left: those of no use here."""

    videos: tuple[SourceRef, ...]
    captions: dict[str, SourceRef]
    left: dict[str, Left]


def list_files(backend: DataBackend) -> Listing:
    """Sort a backend's files by what their names say. Raises DataError."""
    videos, texts, left = [], {}, {}
    for ref in backend.refs():
        if ref.id.startswith(".") or "/." in ref.id:
            continue
        suffix = posixpath.splitext(ref.id)[1].lower()
        if not _utf8(ref.id):
            left[ref.id.encode(errors="backslashreplace").decode()] = Left(
                "dropped", "bad name", "its name is not UTF-8: rename it"
            )
        elif suffix in SUFFIXES:
            videos.append(ref)
        elif suffix == captions.SUFFIX:
            texts[captions.stem(ref.id)] = ref
        else:
            kind = f"not a video: {suffix or 'no suffix'}"
            left[ref.id] = Left("dropped", kind, kind)
    return Listing(tuple(videos), texts, left)


def _utf8(name: str) -> bool:
    """Whether a name can be written down; other bytes of a file name arrive as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
