"""`vtrain data show`: one source file, all that is known of it, and a picture of what training sees."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from vtrain.cli.data import as_record, looked
from vtrain.cli.data_facts import (
    SOUND,
    ShownMask,
    TextEntry,
    WindowFacts,
    decoded_mask,
    known_mask,
    part_text,
    percent,
    preview,
    seconds_text,
    show_facts,
    shown_mask,
    state_of,
    stretch_text,
)
from vtrain.cli.report import one_line, say
from vtrain.contract import Caption, DataError, Device, Problem, Role, SupportsWording
from vtrain.data.caching.inventory import DROPPED, Stores
from vtrain.data.decoding.video import FileFault
from vtrain.data.decoding.worker import DecodeJob, Workers
from vtrain.data.sample import Sample
from vtrain.data.scanning.captions import stem
from vtrain.data.scanning.files import Files, SourceFile
from vtrain.data.scanning.fitting import stretch
from vtrain.plan.records import Plan
from vtrain.registry.blame import blame
from vtrain.run.prepare import planned
from vtrain.validate.videos import Frames, Strip, spread, write_sheet

SHEETS = "sheets"
"""The folder in cache.dir for contact sheets that are given no other place."""

_MOST_FRAMES = 16
"""Of a window that are shown; of more, so many at even distances, the first and the last among them."""

_MOST_WINDOWS = 32
"""That are shown of a file."""

_MOST_EDGE = 256
"""Pixels of a frame's longer edge that are shown; a larger one is reduced by a whole number."""

_FULL_COLUMNS = 8

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
class ShownFrames:
    """Which frames of windows of one shape are shown, and how much smaller: 1 shows every pixel, 2 a quarter of them."""

    picks: tuple[int, ...]
    reduced: int
    columns: int

    @classmethod
    def of(cls, frames: int, height: int, width: int, *, full: bool) -> ShownFrames:
        """full: every frame, at its own size."""
        if full:
            return cls(tuple(range(frames)), 1, _FULL_COLUMNS)
        return cls(spread(frames, _MOST_FRAMES), -(-max(height, width) // _MOST_EDGE), _MOST_FRAMES)

    def strip(self, label: str, frames: Frames, times: Sequence[float]) -> Strip:
        """frames, times: of the whole window."""
        shown = [np.asarray(Image.fromarray(frames[pick]).reduce(self.reduced)) for pick in self.picks]
        return Strip(label, np.stack(shown), [f"{times[pick]:.3f} s" for pick in self.picks])

    def words(self, frames: int) -> str:
        """What of the frames is shown."""
        which = "every frame" if len(self.picks) == frames else f"{len(self.picks)} of {frames} frames"
        return f"{which}, {'every pixel' if self.reduced == 1 else f'at 1/{self.reduced} of the size'}"


def show_file(path: Path, name: str, asked: Asked, as_json: bool) -> None:
    """Print it. name: as `Files.named` takes it. Raises what planning raises; DataError where there is no such file, or
    where it cannot be decoded."""
    plan = planned(path)
    files = looked(plan)
    file = _only(files, name)
    samples = files.samples(file)
    stores = Stores(plan)
    mask = _mask(plan, files, samples)
    with blame(plan.config.parts()):
        texts = list(_texts(plan, stores, samples))
        file, windows, target = _seen(plan, stores, file, samples, asked)
    if as_json:
        record = {
            "file": as_record(file), "place": plan.datasets[file.number].backend.location,
            "mask": None if mask is None else asdict(mask), "image_to_video": plan.datasets[file.number].image_to_video,
            "video": [asdict(window) for window in windows],
            "text": [{**asdict(entry), "extras": dict(entry.extras)} for entry in texts],
            "sheet": None if target is None else str(target),
        }  # fmt: skip
        typer.echo(json.dumps(record, indent=2))
    else:
        show_facts(plan, file, samples, mask, windows, texts)
        if target is not None:
            say(f"contact sheet: {target}")
    if faults := dict.fromkeys(fault for window in windows for fault in window.faults):
        raise DataError(Problem(file.name, f"{fault}.") for fault in faults)


def _mask(plan: Plan, files: Files, samples: tuple[Sample, ...]) -> ShownMask | None:
    """Of a file that is used."""
    if not samples or samples[0].mask is None:
        return None
    probe = files.probe(samples[0].dataset, samples[0].mask.ref.id)
    assert probe is not None  # a clip whose mask cannot be probed is not used
    return shown_mask(plan.datasets[samples[0].place], samples[0], probe)


def _only(files: Files, name: str) -> SourceFile:
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
        wording = plan.family.wording(caption, role) if isinstance(plan.family, SupportsWording) else None
        for name in stores.encoders:
            key = stores.text_key(name, caption, role)
            state = state_of(stores.text, key)
            yield TextEntry(role, caption.text, caption.extras, wording, name, key, state)


def _seen(
    plan: Plan, stores: Stores, file: SourceFile, samples: tuple[Sample, ...], asked: Asked
) -> tuple[SourceFile, list[WindowFacts], Path | None]:
    """The file, with its content if it was read for that; its windows, decoded for a contact sheet if one is asked for; and
    where that is."""
    pairs = [(sample, start) for sample in samples for start in sample.starts]
    windows = [_window(stores, file, sample, start, sample.content) for sample, start in pairs]
    if asked.none or not pairs:
        return file, windows, None
    shape = pairs[0][0].shape
    picture = ShownFrames.of(*shape, full=asked.full)
    strips: list[list[Strip]] = []
    for number, seen in enumerate(_decoded(plan, stores, pairs[:_MOST_WINDOWS], windows, picture)):
        windows[number] = seen.window
        if seen.strips:
            file = replace(file, content=seen.content)
            strips.append(list(seen.strips))
    if not strips:
        return file, windows, None
    if asked.decode:
        _reconstruct(plan, stores, windows[: len(strips)], picture, strips)
    target = (asked.sheet or plan.config.cache.dir / SHEETS / _sheet_name(file)).absolute()
    title = [
        one_line(file.name),
        f"{shape} at {pairs[0][0].fps:g} fps, {picture.words(shape.frames)}"
        + (f", {len(strips)} of {len(pairs)} windows" if len(strips) < len(pairs) else ""),
        *(one_line(caption.text)[:200] for caption in samples[0].captions[:1]),
    ]
    try:
        write_sheet(target, title, [strip for group in strips for strip in group], picture.columns)
    except OSError as error:
        what = f"the contact sheet cannot be written: {error.strerror or error}."
        raise DataError(Problem(str(target), what, "Give another file with --sheet.")) from error
    return file, windows, target


def _window(stores: Stores, file: SourceFile, sample: Sample, start: float, content: str) -> WindowFacts:
    """content: SHA-256 of the file's bytes, "" if that is not known."""
    key = stores.video_key(sample, start, content) if content else ""
    scale = (sample.shape.width / sample.box.width, sample.shape.height / sample.box.height)
    changed = stretch(file.probe, sample.box, sample.shape.size) if file.probe is not None else 1.0
    times = tuple(sample.times(start))
    artifact = stores.masks if sample.mask is not None else None
    mask = None if artifact is None else known_mask(artifact, sample, start)
    return WindowFacts(sample.id, start, times, sample.box, scale, changed, key, state_of(stores.video, key), mask=mask)


@dataclass(frozen=True)
class _Seen:
    """A window that was decoded for a contact sheet. strips: the window, and its mask on it; none if it has a fault."""

    window: WindowFacts
    content: str = ""
    strips: tuple[Strip, ...] = ()


def _decoded(
    plan: Plan,
    stores: Stores,
    pairs: Iterable[tuple[Sample, float]],
    windows: Iterable[WindowFacts],
    picture: ShownFrames,
) -> Iterator[_Seen]:
    """Each window as the caches would decode it."""
    with Workers(1, max(dataset.table.decode_timeout for dataset in plan.datasets)) as workers:
        for number, ((sample, _), window) in enumerate(zip(pairs, windows, strict=False), start=1):
            dataset = plan.datasets[sample.place]
            job = DecodeJob(dataset.backend, sample, window.start, torchcodec=bool(dataset.decoder))
            done = workers.done(job)
            if done.content is None or done.pixels is None:
                fault = done.fault or FileFault("was not decoded", lasting=False)
                yield _Seen(replace(window, fault=fault.reason))
                continue
            key = stores.video_key(sample, window.start, done.content)
            decoder = f"PyAV, since {done.unfit}" if done.unfit else dataset.decoder or "PyAV"
            seen = replace(window, key=key, state=state_of(stores.video, key), decoder=decoder)
            frames = done.pixels.permute(1, 2, 3, 0).contiguous().numpy()
            changed = f", aspect changed by {stretch_text(window.stretch)}" if window.stretch >= _SQUEEZED else ""
            part = f"{part_text(sample.box)} of {sample.picture}{changed}"
            strip = picture.strip(f"window {number}: {seconds_text(window.times)}, {part}", frames, window.times)
            yield _with_mask(
                plan, stores, workers, sample, _Seen(seen, done.content, (strip,)), frames, picture, number
            )


def _with_mask(
    plan: Plan,
    stores: Stores,
    workers: Workers,
    sample: Sample,
    seen: _Seen,
    frames: Frames,
    picture: ShownFrames,
    number: int,
) -> _Seen:
    """The window's mask too, if it has one: decoded as the caches would, and shown on all its frames."""
    window = seen.window
    if sample.mask is None or stores.masks is None:
        return seen
    mask, counts = decoded_mask(plan, stores.masks, workers, sample, window.start)
    seen = replace(seen, window=replace(window, mask=mask))
    if counts is None or mask.area is None:
        return seen
    latents = f"its mask as the {counts.shape[2]}x{counts.shape[1]} latents have it"
    on_clip = preview(frames, counts, stores.masks.grid(sample.shape).spans)
    strip = picture.strip(f"window {number}: {latents}, {percent(mask.area)} of it trains", on_clip, window.times)
    return replace(seen, strips=(*seen.strips, strip))


def _reconstruct(
    plan: Plan, stores: Stores, windows: Iterable[WindowFacts], picture: ShownFrames, strips: list[list[Strip]]
) -> None:
    """Below each window whose entry is sound: what the video codec makes of it."""
    import torch

    from vtrain.validate.generate import to_frames

    sound = [(number, window) for number, window in enumerate(windows) if window.state == SOUND]
    if not sound:
        say("--decode: no entry of this file is cached; `vtrain cache fill` makes them", err=True)
        return
    device, notices = Device.find()
    for notice in notices:
        say(f"WARNING: {notice}", err=True)
    lower = ("CUDA_VISIBLE_DEVICES= (empty), which decodes on the CPU",)
    explained = device.explained("decoding cached latents", lower)
    with explained, plan.family.open_video_codec(str(device)) as codec, torch.no_grad():
        for number, window in sound:
            latents = device.move(stores.video.read(window.key)["mean"][None])
            frames = to_frames(codec.decode(latents)[0]).numpy()
            label = f"window {number + 1}: from its cached latents, by the video codec"
            strips[number].append(picture.strip(label, frames, window.times))


def _sheet_name(file: SourceFile) -> str:
    """Of its own for each file of each dataset, and plain."""
    words = re.sub(r"[^A-Za-z0-9_]+", "-", stem(file.name)).strip("-")[-60:]
    return f"{words}-{hashlib.sha256(file.name.encode()).hexdigest()[:8]}.png"
