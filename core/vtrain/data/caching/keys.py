"""Names of cache entries: a hash of everything that decides over their content. Imports no torch."""

from __future__ import annotations

import hashlib
import json

from vtrain.contract import Caption, Role
from vtrain.data.sample import Sample

TRANSFORM_VERSION = 2
"""Raised when the pixels that `decode` makes of a file change: part of every video key, and of what decides over files."""

FORMAT = "vtrain-cache-3"
"""Layout of an entry, in its name and in its metadata."""


def text_key(caption: Caption, role: Role, fingerprint: str) -> str:
    """fingerprint: the family's, of its text encoder."""
    return _key("text", fingerprint, role, caption.text, sorted(caption.extras.items()))


def video_key(content: str, sample: Sample, start: float, transform: int, fingerprint: str, *, std: bool) -> str:
    """content: SHA-256 of the source's bytes. start: of the window. fingerprint: the family's, of its video codec.

    std: whether the entry holds the std beside the mean.
    """
    window = [start, sample.fps, *sample.shape]
    return _key("video", fingerprint, content, transform, window, sample.box, *(["std"] if std else []))


def _key(*parts: object) -> str:
    """SHA-256 of canonical JSON."""
    text = json.dumps([FORMAT, *parts], ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
