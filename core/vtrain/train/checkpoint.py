"""Checkpoints on disk: written aside, fsynced, renamed; sound if the manifest, written last, says so."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from vtrain.contract import CheckpointError, Problem

MANIFEST = "MANIFEST.json"
FORMAT = 1
NAME = re.compile(r"step-(\d{6,})")
PARTIAL = ".partial"
CHUNK = 1 << 22


@dataclass(frozen=True)
class Fault:
    """Why a folder is no sound checkpoint."""

    folder: Path
    reason: str


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def write(parent: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Make the checkpoint of `step` below `parent`; `fill` writes its files into an empty folder.

    Raises CheckpointError, and leaves every other checkpoint as it was, if it cannot be written.
    """
    final = parent / checkpoint_name(step)
    aside = parent / (checkpoint_name(step) + PARTIAL)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        fill(aside)
        _seal(aside)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _sync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        newest = latest(parent)[0]
        kept = f"The newest sound checkpoint is {newest}." if newest else "There is no earlier checkpoint."
        raise CheckpointError(
            Problem(str(final), f"the checkpoint could not be written: {error}.", f"{kept} Make room on the disk.")
        ) from error
    return final


def _seal(folder: Path) -> None:
    """Sync all files, then write the manifest of their sizes and hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {}
    for path in files:
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1), encoding="utf-8")
    _sync(manifest)
    for below in {path.parent for path in files} | {folder}:
        _sync(below)


def _sync(path: Path) -> None:
    """Windows cannot open a folder, and syncs only what is open for writing."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def fault(folder: Path) -> str | None:
    """Why `folder` is not a sound checkpoint; None if it is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, and this vtrain reads {FORMAT}"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if _sha256(path) != entry["sha256"]:
            return f"{name} is damaged: its content is not what was written"
    return None


def steps_saved(parent: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all finished-looking checkpoints, oldest first. Nothing is verified."""
    if not parent.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in parent.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def latest(parent: Path) -> tuple[Path | None, list[Fault]]:
    """The newest sound checkpoint, and what is wrong with the newer ones."""
    faults: list[Fault] = []
    for _, folder in reversed(steps_saved(parent)):
        reason = fault(folder)
        if reason is None:
            return folder, faults
        faults.append(Fault(folder, reason))
    return None, faults


def set_aside(parent: Path, after: int) -> list[Path]:
    """Rename checkpoints later than step `after`, which a run that goes on from there leaves behind. Gives the new names."""
    moved = []
    for step, folder in steps_saved(parent):
        if step > after:
            turn = 1
            while (target := folder.with_name(f"{folder.name}.left-behind-{turn}")).exists():
                turn += 1
            moved.append(folder.rename(target))
    return moved


def prune(parent: Path, keep: int | Literal["all"], newest: Path) -> list[Path]:
    """Delete all but the newest `keep`, once `newest` has verified. Gives what was deleted."""
    saved = [folder for _, folder in steps_saved(parent)]
    gone = saved[:-keep] if keep != "all" else []
    if not gone or newest in gone:
        return []
    reason = fault(newest)
    if reason is not None:
        raise CheckpointError(
            Problem(str(newest), f"the new checkpoint did not verify: {reason}.", "Older ones are kept.")
        )
    for folder in gone:
        shutil.rmtree(folder)
    return gone
