"""How a key of the file is written, everywhere the same: `train.batch_size`, `data[0].video.frames`; and keys of before.

Messages, `vtrain config show`, plan.json, a checkpoint's state and what a resume compares write keys so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]
"""A value's place in the file: ("data", 0, "video", "frames"). A number is that of a list's entry, from 0."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STEP = re.compile(r'\[(\d+)\]|\.?("(?:[^"\\]|\\.)*"|[^.\[\]"]+)')


def key_text(path: KeyPath) -> str:
    """ "data[0].video.frames"; a name that TOML would quote stands in quotes: 'validation.prompts."a cat"'."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _BARE.fullmatch(part) else json.dumps(part, ensure_ascii=False)
            text += f".{name}" if text else name
    return text


def key_path(text: str) -> KeyPath:
    """The path that `key_text` wrote. Raises ValueError if it wrote no such text."""
    path: list[str | int] = []
    at = 0
    while at < len(text):
        step = _STEP.match(text, at)
        if step is None:
            raise ValueError(f"{text!r} is no key")
        name = step[2]
        path.append(int(step[1]) if name is None else json.loads(name) if name.startswith('"') else name)
        at = step.end()
    return tuple(path)


@dataclass(frozen=True)
class Renamed:
    """A key, or a table, that has another name now. old, new: names from the outermost table on. remedy: what to write."""

    old: tuple[str, ...]
    new: tuple[str, ...]
    remedy: str


RENAMED = (
    Renamed(
        ("train", "clip"),
        ("train", "gradient_clip"),
        "Clips are videos. Its keys are the same: gradient_clip = { method = ..., max = ... }, or [train.gradient_clip].",
    ),
    Renamed(
        ("data", "video", "frame_interval"),
        ("data", "video", "frame_step"),
        "This key had two meanings. To take every n-th frame, as it did here: frame_step = n. To round the lengths of clips "
        "down to steps of n frames, so that there are fewer buckets, as SimpleTuner's frame_interval does: round_to = n.",
    ),
)
"""The one table of keys renamed. A file that says the old name is told the new one; a checkpoint's settings are read by it."""


@dataclass(frozen=True)
class Removed:
    """A key that there is no more. old: names from the outermost table on. meant: its value wherever all is as it was.

    remedy: where what it said is now.
    """

    old: tuple[str, ...]
    meant: object
    remedy: str


REMOVED = (
    Removed(
        ("sampler", "timestep_scale"),
        1000.0,
        "The unit of the timestep belongs to the model family, which knows what its denoiser was trained with (for 1000 x level "
        "it was this key's default). Remove the line.",
    ),
)
"""The one table of keys that are gone. A file that has one is refused with the reason; a checkpoint may have one at `meant`."""


ADDED: Mapping[tuple[str, ...], object] = {
    ("model", "lora", "dora"): False,
    ("model", "lora", "rslora"): False,
    ("model", "lora", "init"): "kaiming",
}
"""Keys that checkpoints of before lack though they have the table -> what those runs did."""


def removed(path: KeyPath) -> Removed | None:
    """What there is to say of a key that there is no more; None of any other."""
    return next((each for each in REMOVED if each.old == path), None)


_CLIP = (
    "CLIP compares single pictures with their captions: it sees no motion, and with a video model it is no measure of "
    "progress. Look at the videos and, for a number, at the loss."
)
ON_PURPOSE: Mapping[str, str] = {"clip_score": _CLIP, "evaluation_type": _CLIP}
"""Names that people look for, in any table, and that there are none of on purpose -> why."""


def renamed(path: KeyPath) -> tuple[KeyPath, Renamed] | None:
    """The path as it is called now, and what was renamed of it; None if it is called so still."""
    for each in RENAMED:
        end = _end(path, each.old)
        if end is not None:
            # What stays keeps its numbers: data[1].video.frame_interval is data[1].video.frame_step.
            shared = next(n for n, (old, new) in enumerate(zip(each.old, each.new, strict=False)) if old != new)
            kept = path[: _end(path, each.old[:shared])]
            return (*kept, *each.new[shared:], *path[end:]), each
    return None


def _end(path: KeyPath, names: tuple[str, ...]) -> int | None:
    """How far `names` go in a path, with the number of an entry behind the last of them; None if they are not its first."""
    end = 0
    for name in names:
        if path[end : end + 1] != (name,):
            return None
        end += 1
        while end < len(path) and isinstance(path[end], int):
            end += 1
    return end


def as_called_now(path: KeyPath) -> KeyPath:
    """A path whose names are the ones of today."""
    found = renamed(path)
    return path if found is None else found[0]
