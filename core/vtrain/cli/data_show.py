"""`vtrain data show`: one source file, all that is known of it, and a picture of what training sees."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from vtrain.cli.data import as_record, looked
from vtrain.cli.plan import show_sections
from vtrain.cli.prepare import planned
from vtrain.cli.report import one_line
from vtrain.contract import Caption, DataError, Problem, Role, SupportsWording
from vtrain.data.caching.entries import Entries
from vtrain.data.caching.stores import Stores
from vtrain.data.caching.wanted import DROPPED
from vtrain.data.decoding.video import FileFault
from vtrain.data.decoding.worker import DecodeJob, Workers
from vtrain.data.sample import Box, Sample
from vtrain.data.scanning.boxes import stretch
from vtrain.data.scanning.captions import stem
from vtrain.data.scanning.files import File, Files
from vtrain.plan.price import bytes_text
from vtrain.plan.records import Plan, Section
from vtrain.registry.blame import blame

if TYPE_CHECKING:
    from vtrain.cli.sheet import Layout, Strip

SHEETS = "sheets"
"""The folder in cache.dir for contact sheets that are given no other place."""

_SQUEEZED = 1.005
"""A picture that becomes this much wider or higher is said to be squeezed on the contact sheet."""


@dataclass(frozen=True)
class Asked:
    """What is asked for beside the facts. sheet: the contact sheet's file; None: in the cache folder.

    none: no sheet. full: one with every frame at its own size. decode: with the video codec's view of cached latents.
    """

    sheet: Path | None = None
    none: bool = False
    full: bool = False
    decode: bool = False


@dataclass(frozen=True)
class Window:
    """One entry of the video cache. scale: size in the bucket by size in the source, across and down.

    stretch: how much wider or higher the picture becomes, at least 1. key: "" if the file's bytes were never read.
    state: of the entry. fault: why it cannot be decoded, or "". decoder: which one decoded it, "" if none did.
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


@dataclass(frozen=True)
class TextEntry:
    """One entry of the text cache. wording: what the encoder reads; None if the family does not say."""

    role: Role
    text: str
    extras: Mapping[str, float | int | str]
    wording: str | None
    key: str
    state: str


def show_file(path: Path, name: str, asked: Asked, as_json: bool) -> None:
    """Print it. name: as `Files.named` takes it. Raises what planning raises; DataError where there is no such file, or
    where it cannot be decoded."""
    plan = planned(path)
    files = looked(plan)
    file = _only(files, name)
    samples = files.samples(file)
    stores = Stores(plan)
    with blame(plan.config.parts()):
        texts = list(_texts(plan, stores, samples))
        file, windows, target = _seen(plan, stores, file, samples, asked)
    if as_json:
        record = {
            "file": as_record(file), "place": plan.datasets[file.number].backend.location,
            "mask": samples[0].mask_ref if samples else "", "image_to_video": plan.datasets[file.number].image_to_video,
            "video": [asdict(window) for window in windows],
            "text": [{**asdict(entry), "extras": dict(entry.extras)} for entry in texts],
            "sheet": None if target is None else str(target),
        }  # fmt: skip
        typer.echo(json.dumps(record, indent=2))
    else:
        _print(plan, file, samples, windows, texts)
        if target is not None:
            typer.echo(one_line(f"contact sheet: {target}"))
    if faults := dict.fromkeys(window.fault for window in windows if window.fault):
        raise DataError(Problem(file.name, f"{fault}.") for fault in faults)


def _only(files: Files, name: str) -> File:
    """The file that is meant. Raises DataError."""
    found = files.named(name)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(one_line(file.name) for file in found)
        raise DataError(Problem(name, "several datasets have this file.", f"Give one of: {names}."))
    like = [f'"{one_line(each)}"' for each in files.like(name)]
    remedy = f"Did you mean {' or '.join(like)}?" if like else "`vtrain data list` names all files."
    raise DataError([*files.problems, Problem(name, "no dataset has such a file.", remedy)])


def _texts(plan: Plan, stores: Stores, samples: tuple[Sample, ...]) -> Iterator[TextEntry]:
    """What is encoded of a file's captions, and what stands for a dropped one."""
    captions = samples[0].captions if samples else ()
    wanted: list[tuple[Caption, Role]] = [(caption, "prompt") for caption in captions]
    if captions and plan.config.train.caption_dropout > 0:
        wanted.append((DROPPED, "dropped"))
    for caption, role in wanted:
        key = stores.text_key(caption, role)
        wording = plan.family.wording(caption, role) if isinstance(plan.family, SupportsWording) else None
        yield TextEntry(role, caption.text, caption.extras, wording, key, _state(stores.text, key))


def _state(entries: Entries, key: str) -> str:
    """Of an entry, all its bytes read."""
    if not key:
        return "unknown: the file was not read yet"
    try:
        fault = entries.damage(key)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return "sound" if fault is None else f"damaged: {fault}"


def _seen(
    plan: Plan, stores: Stores, file: File, samples: tuple[Sample, ...], asked: Asked
) -> tuple[File, list[Window], Path | None]:
    """The file, with its content if it was read for that; its windows, decoded for a contact sheet if one is asked for; and
    where that is."""
    pairs = [(sample, start) for sample in samples for start in sample.starts]
    windows = [_window(stores, file, sample, start, sample.content) for sample, start in pairs]
    if asked.none or not pairs:
        return file, windows, None
    from vtrain.cli import sheet

    shape = pairs[0][0].shape
    layout = sheet.Layout.of(*shape, full=asked.full)
    strips: list[list[Strip]] = []
    for number, (content, decoder, strip) in enumerate(_decoded(plan, pairs[: sheet.MOST_WINDOWS], windows, layout)):
        sample, start = pairs[number]
        if isinstance(strip, FileFault):
            windows[number] = replace(windows[number], fault=strip.reason)
        else:
            file = replace(file, content=content)
            windows[number] = replace(_window(stores, file, sample, start, content), decoder=decoder)
            strips.append([strip])
    if not strips:
        return file, windows, None
    if asked.decode:
        _reconstruct(plan, stores, windows[: len(strips)], layout, strips)
    target = (asked.sheet or plan.config.cache.dir / SHEETS / _sheet_name(file)).absolute()
    title = [
        one_line(file.name),
        f"{shape} at {pairs[0][0].fps:g} fps, {layout.words(shape.frames)}"
        + (f", {len(strips)} of {len(pairs)} windows" if len(strips) < len(pairs) else ""),
        *(one_line(caption.text)[:200] for caption in samples[0].captions[:1]),
    ]
    sheet.write(target, title, [strip for group in strips for strip in group], layout.columns)
    return file, windows, target


def _window(stores: Stores, file: File, sample: Sample, start: float, content: str) -> Window:
    """content: SHA-256 of the file's bytes, "" if that is not known."""
    key = stores.video_key(sample, start, content) if content else ""
    scale = (sample.shape.width / sample.box.width, sample.shape.height / sample.box.height)
    changed = stretch(file.probe, sample.box, sample.shape.size) if file.probe is not None else 1.0
    times = tuple(sample.times(start))
    return Window(sample.id, start, times, sample.box, scale, changed, key, _state(stores.video, key))


def _decoded(
    plan: Plan, pairs: Iterable[tuple[Sample, float]], windows: Iterable[Window], layout: Layout
) -> Iterator[tuple[str, str, Strip | FileFault]]:
    """Each window as the caches would decode it, behind the SHA-256 of the file's bytes and what decoded it."""
    with Workers(1, max(dataset.table.decode_timeout for dataset in plan.datasets)) as workers:
        for number, ((sample, start), window) in enumerate(zip(pairs, windows, strict=False), start=1):
            dataset = plan.datasets[sample.place]
            done = workers.done(DecodeJob(dataset.backend, sample, start, torchcodec=bool(dataset.decoder)))
            if done.content is None or done.pixels is None:
                yield "", "", done.fault or FileFault("was not decoded", lasting=False)
                continue
            decoder = f"PyAV, since {done.unfit}" if done.unfit else dataset.decoder or "PyAV"
            times = sample.times(start)
            changed = f", aspect changed by {_percent(window.stretch)}" if window.stretch >= _SQUEEZED else ""
            label = f"window {number}: {_seconds(times)}, {_part(sample.box)} of {sample.picture}{changed}"
            yield (
                done.content,
                decoder,
                layout.strip(label, done.pixels.permute(1, 2, 3, 0).contiguous().numpy(), times),
            )


def _reconstruct(
    plan: Plan, stores: Stores, windows: Iterable[Window], layout: Layout, strips: list[list[Strip]]
) -> None:
    """Below each window whose entry is sound: what the video codec makes of it."""
    import torch

    from vtrain.validate.video import to_frames

    sound = [(number, window) for number, window in enumerate(windows) if window.state == "sound"]
    if not sound:
        typer.echo("--decode: no entry of this file is cached; `vtrain cache fill` makes them", err=True)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with plan.family.open_video_codec(device) as codec, torch.no_grad():
        for number, window in sound:
            latents = stores.video.read(window.key)["mean"][None].to(device)
            frames = to_frames(codec.decode(latents)[0]).numpy()
            label = f"window {number + 1}: from its cached latents, by the video codec"
            strips[number].append(layout.strip(label, frames, window.times))


def _sheet_name(file: File) -> str:
    """Of its own for each file of each dataset, and plain."""
    words = re.sub(r"[^A-Za-z0-9_]+", "-", stem(file.name)).strip("-")[-60:]
    return f"{words}-{hashlib.sha256(file.name.encode()).hexdigest()[:8]}.png"


def _print(plan: Plan, file: File, samples: tuple[Sample, ...], windows: list[Window], texts: list[TextEntry]) -> None:
    parts = [
        Section(one_line(file.name), (*_about(plan, file, samples), *_decoders(plan, file, windows))),
        Section("windows", tuple(_window_rows(windows)), table=True),
        Section("captions", tuple(_text_rows(texts))),
        Section("cached video", tuple((f"window {n}", f"{w.key or '-'}  {w.state}") for n, w in enumerate(windows, 1))),
        Section("cached text", tuple((label, f"{e.key}  {e.state}") for label, e in _labelled(texts))),
    ]
    show_sections(Console(soft_wrap=True, highlight=False), [part for part in parts if part.rows])


def _about(plan: Plan, file: File, samples: tuple[Sample, ...]) -> Iterator[tuple[str, str]]:
    yield "place", plan.datasets[file.number].backend.location
    yield "size", f"{bytes_text(file.ref.size)} ({file.ref.size} bytes), version {file.ref.version}"
    yield "sha256", file.content or "not known: its bytes are read when it is cached"
    if (probe := file.probe) is not None:
        yield "video", f"{probe.codec}, {probe.width}x{probe.height}{f', {probe.turned}' if probe.turned else ''}"
        if probe.pixel_aspect != 1:
            shown = round(probe.width * probe.pixel_aspect)
            yield "pixels", f"{probe.pixel_aspect:.4g} times as wide as high: shown as {shown}x{probe.height}"
        rate = f", {probe.own_rate:.6g} frames per second" if probe.frames > 1 and probe.duration > 0 else ""
        yield "length", f"{probe.frames} frame{'s' if probe.frames != 1 else ''}{rate}, {probe.duration:.3f} s"
    if file.status != "used":
        yield file.status, f"{file.kind}: {file.reason}" if file.kind != file.reason else file.reason
        return
    several = f"{file.samples} samples, {file.windows} windows" if file.windows > 1 else "1 window"
    yield "used", f"as {file.shape} at {samples[0].fps:g} fps, {several}" if samples else f"as {file.shape}"
    if samples and samples[0].mask_ref:
        yield "mask", samples[0].mask_ref
    if share := plan.datasets[file.number].image_to_video:
        yield "first frame", f"given to the model at {100 * share:.4g}% of its draws (image to video)"


def _decoders(plan: Plan, file: File, windows: list[Window]) -> Iterator[tuple[str, str]]:
    """What decoded the file, where that is not PyAV anyway."""
    if not (decoder := plan.datasets[file.number].decoder) or not windows:
        return
    for found in dict.fromkeys(window.decoder for window in windows if window.decoder) or [""]:
        yield "decoder", one_line(found) or f"{decoder}, or PyAV: a contact sheet shows which"


def _window_rows(windows: list[Window]) -> Iterator[tuple[str, ...]]:
    if not windows:
        return
    yield "window", "first frame", "last frame", "one every", "part of the picture", "scaled by", "aspect changed by"
    for number, window in enumerate(windows, start=1):
        every = f"{window.times[1] - window.times[0]:.4g} s" if len(window.times) > 1 else "-"
        across, down = (f"{factor:.3f}" for factor in window.scale)
        scale = across if across == down else f"{across} x {down}"
        ends = (f"{window.times[0]:.3f} s", f"{window.times[-1]:.3f} s")
        yield str(number), *ends, every, _part(window.box), scale, _percent(window.stretch)


def _part(box: Box) -> str:
    return f"{box.width}x{box.height}+{box.left}+{box.top}"


def _percent(stretch: float) -> str:
    return f"{100 * (stretch - 1):.1f}%"


def _seconds(times: list[float]) -> str:
    return f"{times[0]:.3f} to {times[-1]:.3f} s"


def _labelled(texts: list[TextEntry]) -> Iterator[tuple[str, TextEntry]]:
    prompts = sum(entry.role == "prompt" for entry in texts)
    for number, entry in enumerate(texts, start=1):
        yield ("dropped" if entry.role == "dropped" else f"caption {number}" if prompts > 1 else "caption"), entry


def _text_rows(texts: list[TextEntry]) -> Iterator[tuple[str, str]]:
    for label, entry in _labelled(texts):
        if entry.role == "prompt":
            yield label, entry.text
            yield from ((name, str(value)) for name, value in entry.extras.items())
        if entry.wording is not None:
            reading = _shortened(entry.wording, len(entry.text)) or "(nothing)"
            yield "read as" if entry.role == "prompt" else f"{label}, read as", reading


def _shortened(wording: str, caption: int) -> str:
    """Without the middle of a long instruction. caption: letters of what it is given for."""
    head, tail = 60, caption + 60
    left_out = len(wording) - head - tail
    if left_out < head:
        return wording
    return f"{wording[:head]} [... {left_out} letters more, see --json ...] {wording[-tail:]}"
