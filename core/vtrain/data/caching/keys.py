"""Names of cache entries: a hash of everything that decides over their content. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from vtrain.contract import Caption, Role, TokenGrid
from vtrain.data.sample import MASK_VERSION, TRANSFORM_VERSION, MaskGrid, Sample

FORMAT = "vtrain-cache-3"
"""Layout of an entry, in its name and in its metadata."""


def text_key(caption: Caption, role: Role, fingerprint: str) -> str:
    """fingerprint: the family's, of its text encoder."""
    return _key("text", fingerprint, role, caption.text, sorted(caption.extras.items()))


def transform(decoder: str) -> int | str:
    """Version of how pixels are made. decoder: of the dataset's plan; what another one makes are other pixels."""
    return f"{TRANSFORM_VERSION}, {decoder}" if decoder else TRANSFORM_VERSION


def video_key(content: str, sample: Sample, start: float, transform: int | str, fingerprint: str, *, std: bool) -> str:
    """content: SHA-256 of the source's bytes. start: of the window. fingerprint: the family's, of its video codec.

    std: whether the entry holds the std beside the mean.
    """
    return _key("video", fingerprint, content, transform, _window(sample, start), sample.box, *(["std"] if std else []))


def features_key(
    content: str,
    sample: Sample,
    start: float,
    transform: int | str,
    name: str,
    fingerprint: str,
    grid: TokenGrid,
    frames: Sequence[int],
) -> str:
    """name, fingerprint: of the regularizer and its encoder. grid: of the clip's tokens; frames: that stand for these."""
    window = _window(sample, start)
    return _key("features", name, fingerprint, content, transform, window, sample.box, grid, list(frames))


def mask_key(content: str, sample: Sample, start: float, grid: MaskGrid) -> str:
    """content: SHA-256 of the mask's bytes. The box is a part of the clip's picture, whatever the mask's own size."""
    spans = [[span.start, span.stop] for span in grid.spans]
    picture = [sample.picture, sample.box]
    return _key("mask", content, MASK_VERSION, _window(sample, start), picture, spans, grid.height, grid.width)


def _window(sample: Sample, start: float) -> list[float]:
    return [start, sample.fps, *sample.shape]


def _key(*parts: object) -> str:
    """SHA-256 of canonical JSON."""
    text = json.dumps([FORMAT, *parts], ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
