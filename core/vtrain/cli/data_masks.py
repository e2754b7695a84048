"""Masks in `vtrain data show`: what of a clip is trained on, in numbers and on its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vtrain.cli.entry_state import SOUND, state_of
from vtrain.cli.report import one_line
from vtrain.data.caching.columns import MaskColumn, known_key
from vtrain.data.decoding.probe import Probe
from vtrain.data.decoding.worker import MaskJob, Workers
from vtrain.data.sample import Sample
from vtrain.plan.records import DatasetPlan, Plan

if TYPE_CHECKING:
    from torch import Tensor

_DIMMED, _TINT = 0.35, (150.0, 0.0, 60.0)
"""What does not train shows this share of its picture, on this colour."""


@dataclass(frozen=True)
class ShownMask:
    """The mask of a clip. file: its id; kind: "image" or "video"; size: "WxH"; frames: in the file.

    inverted: whether black trains. sha256: of its bytes, "" until they were read.
    """

    file: str
    kind: str
    size: str
    frames: int
    inverted: bool
    sha256: str


@dataclass(frozen=True)
class WindowMask:
    """The mask of a window. area: the part of its latents that trains, 0 to 1; None if it is not known.

    key, state: of its entry. fault: why it cannot be decoded, or "".
    """

    area: float | None
    key: str
    state: str
    fault: str = ""


def shown_mask(dataset: DatasetPlan, sample: Sample, probe: Probe) -> ShownMask | None:
    """None for a clip without one."""
    if sample.mask is None or dataset.masks is None:
        return None
    kind, size = "image" if probe.frames == 1 else "video", f"{probe.width}x{probe.height}"
    return ShownMask(sample.mask.ref.id, kind, size, probe.frames, dataset.masks.invert, sample.mask.content)


def mask_rows(dataset: DatasetPlan, mask: ShownMask | None) -> Iterator[tuple[str, str]]:
    """(label, text) of a clip that is used."""
    if mask is not None:
        frames = f", {mask.frames} frames" if mask.kind == "video" else ""
        trains = "black trains (invert)" if mask.inverted else "white trains"
        yield "mask", f"{one_line(mask.file)}: {mask.kind}, {mask.size}{frames}; {trains}"
    elif dataset.masks is not None:
        yield "mask", "none: all of the picture trains"


def window_rows(masks: Sequence[WindowMask | None]) -> Iterator[tuple[str, str]]:
    """(label, text) of each window with a mask."""
    for number, mask in enumerate(masks, start=1):
        if mask is not None:
            area = "" if mask.area is None else f", {percent(mask.area)} of it trains"
            yield f"window {number}", f"{mask.key or '-'}  {mask.state}{area}"


def percent(area: float) -> str:
    return f"{100 * area:.1f}%"


def known_mask(column: MaskColumn, sample: Sample, start: float) -> WindowMask:
    """As its entry has it, if that is sound."""
    key = known_key(column, sample, start) or ""
    state = state_of(column.entries, key)
    if state != SOUND:
        return WindowMask(None, key, state)
    (mask,) = column.entries.read(key).values()
    return WindowMask(_area(_trained(column, sample, mask)), key, state)


def decoded_mask(
    plan: Plan, column: MaskColumn, workers: Workers, sample: Sample, start: float
) -> tuple[WindowMask, Tensor | None]:
    """As caches would make it, and how much each latent counts (f, h, w); None where it cannot be decoded."""
    job = MaskJob(plan.datasets[sample.place].backend, sample, start, column.grid(sample.shape))
    ((_, done),) = workers.masked([job])
    if done.content is None or done.pixels is None:
        fault = done.fault.reason if done.fault else "its mask was not decoded"
        return replace(known_mask(column, sample, start), fault=fault), None
    mask, key = _trained(column, sample, done.pixels), column.key(sample, start, done.content)
    return WindowMask(_area(mask), key, state_of(column.entries, key)), mask


def _trained(column: MaskColumn, sample: Sample, mask: Tensor) -> Tensor:
    from vtrain.data.decoding.masks import trained

    return trained(mask, invert=column.inverts(sample))


def _area(mask: Tensor) -> float:
    return float(mask.mean(dtype=mask.dtype))


def preview(frames: NDArray[np.uint8], mask: Tensor, spans: Sequence[range]) -> NDArray[np.uint8]:
    """A window's frames (F, H, W, 3) with what does not train dimmed and tinted, a rectangle for each latent.

    mask: (f, h, w) in [0, 1], how much each latent counts; spans: of each of its frames, those for which it stands.
    """
    count, height, width = frames.shape[:3]
    rows, columns = (
        np.arange(edge) * cells // edge for edge, cells in zip((height, width), mask.shape[1:], strict=True)
    )
    latents = [next(latent for latent, span in enumerate(spans) if frame in span) for frame in range(count)]
    cells = mask.numpy()
    shown = np.empty_like(frames)
    for frame, latent in enumerate(latents):
        counts = cells[latent][rows][:, columns, None]
        dimmed = _DIMMED * frames[frame] + (1 - _DIMMED) * np.array(_TINT)
        shown[frame] = np.rint(counts * frames[frame] + (1 - counts) * dimmed)
    return shown
