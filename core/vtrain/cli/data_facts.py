"""`vtrain data show` in words: what is known of a source file, its windows, its captions, its masks and their cache entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from vtrain.cli.plan import show_sections
from vtrain.cli.report import one_line
from vtrain.contract import Role, Section, TokenCount
from vtrain.contract.specs import bytes_text
from vtrain.data.caching.artifacts import MaskArtifact, known_key
from vtrain.data.caching.entries import Entries
from vtrain.data.caching.inventory import Stores
from vtrain.data.decoding.probe import Probe
from vtrain.data.decoding.worker import MaskJob, Workers
from vtrain.data.sample import Box, Sample
from vtrain.data.scanning.extras import shown_extra
from vtrain.data.scanning.files import SourceFile
from vtrain.estimate.render import counted
from vtrain.estimate.tokens import of_limit
from vtrain.plan.records import DatasetPlan, Plan

if TYPE_CHECKING:
    from torch import Tensor


SOUND = "sound"


def state_of(entries: Entries, key: str) -> str:
    """All its bytes read. key: "" where the file that it is made of was not read yet."""
    if not key:
        return "unknown: the file was not read yet"
    try:
        fault = entries.damage(key)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return SOUND if fault is None else f"damaged: {fault}"


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


def mask_window_rows(masks: Sequence[WindowMask | None]) -> Iterator[tuple[str, str]]:
    """(label, text) of each window with a mask."""
    for number, mask in enumerate(masks, start=1):
        if mask is not None:
            area = "" if mask.area is None else f", {percent(mask.area)} of it trains"
            yield f"window {number}", f"{mask.key or '-'}  {mask.state}{area}"


def percent(area: float) -> str:
    return f"{100 * area:.1f}%"


def known_mask(artifact: MaskArtifact, sample: Sample, start: float) -> WindowMask:
    """As its entry has it, if that is sound."""
    key = known_key(artifact, sample, start) or ""
    state = state_of(artifact.entries, key)
    if state != SOUND:
        return WindowMask(None, key, state)
    (mask,) = artifact.entries.read(key).values()
    return WindowMask(_area(_trained(artifact, sample, mask)), key, state)


def decoded_mask(
    plan: Plan, artifact: MaskArtifact, workers: Workers, sample: Sample, start: float
) -> tuple[WindowMask, Tensor | None]:
    """As caches would make it, and how much each latent counts (f, h, w); None where it cannot be decoded."""
    job = MaskJob(plan.datasets[sample.place].backend, sample, start, artifact.grid(sample.shape))
    ((_, done),) = workers.masked([job])
    if done.content is None or done.pixels is None:
        fault = done.fault.reason if done.fault else "its mask was not decoded"
        return replace(known_mask(artifact, sample, start), fault=fault), None
    mask, key = _trained(artifact, sample, done.pixels), artifact.key(sample, start, done.content)
    return WindowMask(_area(mask), key, state_of(artifact.entries, key)), mask


def _trained(artifact: MaskArtifact, sample: Sample, mask: Tensor) -> Tensor:
    from vtrain.data.decoding.masks import trained

    return trained(mask, invert=artifact.inverts(sample))


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


@dataclass(frozen=True)
class ConditionEntry:
    """What is cached of one condition of a window. key: "" if the file's bytes were never read. state: of the entry."""

    key: str
    state: str


def condition_entries(stores: Stores, sample: Sample, start: float, content: str) -> dict[str, ConditionEntry]:
    """By name, of those that the window's draws may have. content: SHA-256 of the file's bytes, "" if that is not known."""
    found: dict[str, ConditionEntry] = {}
    for name, artifact in stores.conditions.items():
        if artifact.covers(sample):
            key = artifact.key(sample, start, content) if content else ""
            found[name] = ConditionEntry(key, state_of(artifact.entries, key))
    return found


def _condition_rows(windows: Sequence[WindowFacts]) -> Iterator[tuple[str, str]]:
    for number, window in enumerate(windows, 1):
        for name, entry in window.conditions.items():
            yield f"window {number}, {name}", f"{entry.key or '-'}  {entry.state}"


@dataclass(frozen=True)
class WindowFacts:
    """One entry of the video cache. scale: size in the bucket by size in the source, across and down.

    stretch: how much wider or higher the picture becomes, at least 1. key: "" if the file's bytes were never read. state: of the
    entry. fault: why it cannot be decoded, or "". decoder: which one decoded it, "" if none did. mask: None for none.
    conditions: by name, of those with an entry.
    """

    sample: str
    start: float
    times: tuple[float, ...]
    box: Box
    scale: tuple[float, float]
    stretch: float
    key: str
    state: str
    fault: str = ""
    decoder: str = ""
    mask: WindowMask | None = None
    conditions: Mapping[str, ConditionEntry] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """Of its file and of its mask's."""
        return [fault for fault in (self.fault, self.mask.fault if self.mask is not None else "") if fault]


@dataclass(frozen=True)
class TextEntry:
    """One entry of the text cache. wording: what encoders read; None if the family does not say. encoder: whose entry it is.
    counts: tokens of the wording by encoder; none where they cannot be counted."""

    role: Role
    text: str
    extras: Mapping[str, float | int | str]
    wording: str | None
    encoder: str
    key: str
    state: str
    counts: tuple[TokenCount, ...] = ()


def show_facts(
    plan: Plan,
    file: SourceFile,
    samples: tuple[Sample, ...],
    mask: ShownMask | None,
    windows: list[WindowFacts],
    texts: list[TextEntry],
) -> None:
    parts = [
        Section(one_line(file.name), (*_about(plan, file, samples, mask), *_decoders(plan, file, windows))),
        Section("windows", tuple(_window_rows(windows)), table=True),
        Section("captions", tuple(_text_rows(texts))),
        Section("caption extras", tuple((e.name, shown_extra(e)) for e in plan.datasets[file.number].extras)),
        Section("cached video", tuple((f"window {n}", f"{w.key or '-'}  {w.state}") for n, w in enumerate(windows, 1))),
        Section("cached masks", tuple(mask_window_rows([window.mask for window in windows]))),
        Section("cached conditions", tuple(_condition_rows(windows))),
        Section("cached text", tuple(_cached_text_rows(texts))),
    ]
    show_sections(Console(soft_wrap=True, highlight=False), [part for part in parts if part.rows])


def _about(
    plan: Plan, file: SourceFile, samples: tuple[Sample, ...], mask: ShownMask | None
) -> Iterator[tuple[str, str]]:
    yield "place", plan.datasets[file.number].backend.location
    yield "size", f"{bytes_text(file.ref.size)} ({file.ref.size} bytes), version {file.ref.version}"
    yield "sha256", file.content or "not known: its bytes are read when it is cached"
    if (probe := file.probe) is not None:
        yield "video", f"{probe.codec}, {probe.width}x{probe.height}{f', {probe.turned}' if probe.turned else ''}"
        if probe.pixel_aspect != 1:
            shown = round(probe.width * probe.pixel_aspect)
            yield "pixels", f"{probe.pixel_aspect:.4g} times as wide as high: shown as {shown}x{probe.height}"
        rate = (
            f", {probe.own_rate:.6g} frames per second{probe.on_average}"
            if probe.frames > 1 and probe.duration > 0
            else ""
        )
        yield "length", f"{probe.frames} frame{'s' if probe.frames != 1 else ''}{rate}, {probe.duration:.3f} s"
    if file.status != "used":
        yield file.status, f"{file.kind}: {file.reason}" if file.kind != file.reason else file.reason
        return
    several = f"{counted(file.samples, 'sample')}, {file.windows} windows" if file.windows > 1 else "1 window"
    yield "used", f"as {file.shape} at {samples[0].fps:g} fps, {several}" if samples else f"as {file.shape}"
    yield from mask_rows(plan.datasets[file.number], mask)
    dataset = plan.datasets[file.number]
    for each in plan.conditions:
        if dataset.has(each):
            share = (
                "every draw" if each.required else f"{100 * dataset.image_to_video:.4g}% of its draws (image to video)"
            )
            yield each.name.replace("_", " "), f"given to the model at {share}"


def _decoders(plan: Plan, file: SourceFile, windows: list[WindowFacts]) -> Iterator[tuple[str, str]]:
    """What decoded the file, where that is not PyAV anyway."""
    if not (decoder := plan.datasets[file.number].decoder) or not windows:
        return
    for found in dict.fromkeys(window.decoder for window in windows if window.decoder) or [""]:
        yield "decoder", one_line(found) or f"{decoder}, or PyAV: a contact sheet shows which"


def _window_rows(windows: list[WindowFacts]) -> Iterator[tuple[str, ...]]:
    if not windows:
        return
    yield "window", "first frame", "last frame", "one every", "part of the picture", "scaled by", "aspect changed by"
    for number, window in enumerate(windows, start=1):
        every = f"{window.times[1] - window.times[0]:.4g} s" if len(window.times) > 1 else "-"
        across, down = (f"{factor:.3f}" for factor in window.scale)
        scale = across if across == down else f"{across} x {down}"
        ends = (f"{window.times[0]:.3f} s", f"{window.times[-1]:.3f} s")
        yield str(number), *ends, every, part_text(window.box), scale, stretch_text(window.stretch)


def part_text(box: Box) -> str:
    return f"{box.width}x{box.height}+{box.left}+{box.top}"


def stretch_text(stretch: float) -> str:
    return f"{100 * (stretch - 1):.1f}%"


def seconds_text(times: Sequence[float]) -> str:
    return f"{times[0]:.3f} to {times[-1]:.3f} s"


def _labelled(texts: list[TextEntry]) -> Iterator[tuple[str, TextEntry]]:
    """Each with the name of its caption. Those of a caption follow each other, one for each encoder."""
    prompts, number = sum(entry.role == "prompt" for entry in _of_first(texts)), 0
    for entry in texts:
        number += entry.encoder == texts[0].encoder
        yield ("dropped" if entry.role == "dropped" else f"caption {number}" if prompts > 1 else "caption"), entry


def _of_first(texts: list[TextEntry]) -> list[TextEntry]:
    """One for each caption."""
    return [entry for entry in texts if entry.encoder == texts[0].encoder]


def _cached_text_rows(texts: list[TextEntry]) -> Iterator[tuple[str, str]]:
    several = len(texts) > len(_of_first(texts))
    for label, entry in _labelled(texts):
        yield f"{label}, {entry.encoder}" if several else label, f"{entry.key}  {entry.state}"


def _text_rows(texts: list[TextEntry]) -> Iterator[tuple[str, str]]:
    for label, entry in _labelled(_of_first(texts)):
        if entry.role == "prompt":
            yield label, entry.text
            yield from ((name, str(value)) for name, value in entry.extras.items())
        if entry.wording is not None:
            reading = _shortened(entry.wording, len(entry.text)) or "(nothing)"
            yield "read as" if entry.role == "prompt" else f"{label}, read as", reading
        if entry.role == "prompt":
            for count in entry.counts:
                yield f"tokens{f' ({count.encoder})' if len(entry.counts) > 1 else ''}", of_limit(count)
                if count.lost:
                    yield "not read", f"{' and '.join(count.lost)}: {count.cut}"


def _shortened(wording: str, caption: int) -> str:
    """Without the middle of a long instruction. caption: letters of what it is given for."""
    head, tail = 60, caption + 60
    skipped = len(wording) - head - tail
    if skipped < head:
        return wording
    return f"{wording[:head]} [... {skipped} letters more, see --json ...] {wording[-tail:]}"
