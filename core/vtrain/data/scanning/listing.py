"""What a file is, told by its name: a video, an image, a caption file, or neither."""

from __future__ import annotations

import posixpath

from vtrain.data.decoding.video import IMAGE_SUFFIXES, SUFFIXES
from vtrain.data.sample import Left
from vtrain.data.scanning.captions import BESIDE

VIDEO, IMAGE, OTHER, MISNAMED = "video", "image", "other", "misnamed"
CLIPS = (VIDEO, IMAGE)
"""Kinds that give samples."""

_KINDS = {
    **dict.fromkeys(SUFFIXES, VIDEO),
    **dict.fromkeys(IMAGE_SUFFIXES, IMAGE),
    **BESIDE,
}

KINDS_VERSION = tuple(sorted(_KINDS.items()))
"""What decides over kinds: a ledger holds them."""


def hidden(ref_id: str) -> bool:
    """Whether a file, or a folder that it is in, has a name that starts with a dot."""
    return ref_id[0] == "." or "/." in ref_id


def kind_of(ref_id: str) -> str:
    """VIDEO, IMAGE, a setting of data.captions for a caption file, or OTHER."""
    return _KINDS.get(suffix_of(ref_id), OTHER)


def suffix_of(ref_id: str) -> str:
    return posixpath.splitext(ref_id)[1].lower()


def is_utf8(name: str) -> bool:
    """Whether a name can be written down; other bytes of a file name arrive as lone surrogates."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(name: str) -> str:
    """A name that is not UTF-8, as it can be written down."""
    return name.encode(errors="backslashreplace").decode()


def useless(ref_id: str, kind: str) -> Left:
    """Why a file that is no clip is left out."""
    if kind == MISNAMED:
        return Left("dropped", "bad name", "its name is not UTF-8: rename it")
    if kind == IMAGE:
        return Left("dropped", "image", "a single image: set data.images = true to use it as a clip of one frame")
    return Left("dropped", "not a video", f"not a video: {suffix_of(ref_id) or 'no suffix'}")
