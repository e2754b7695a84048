"""Checkpoints on disk: a list of pieces, written aside, fsynced, renamed; sound if the manifest, written last, says so.

What is kept is known to the pieces alone (`vtrain.train.pieces`): a new piece of state is one more in the list.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from safetensors import SafetensorError

from vtrain.contract import CheckpointError, Problem
from vtrain.contract.specs import bytes_text
from vtrain.plan.places import CHECKPOINT
from vtrain.train.piece import Piece, State
from vtrain.train.readback import Marks, ReadBack, fault_of, marks_of, read_through

ModelT = TypeVar("ModelT", bound=BaseModel)

MANIFEST = "MANIFEST.json"
FORMAT = 1
PARTIAL = ".partial"
SPOOL = "spool.partial"
"""Folder below that of the checkpoints where shares are put together."""
LEFT_BY_FILE_MANAGERS = re.compile(r"\.DS_Store|\._.*|\.directory|Thumbs\.db|desktop\.ini", re.IGNORECASE)
"""File names that looking into a folder leaves there (macOS, KDE, Windows): nothing reads them, so they harm no checkpoint."""


@dataclass(frozen=True)
class Fault:
    """Why a folder is no sound checkpoint."""

    folder: Path
    reason: str


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Manifest(BaseModel):
    """files: path in the folder, with / -> its content. pieces: name -> paths of its files; None before vtrain wrote it."""

    model_config = ConfigDict(strict=True)

    format: int
    files: dict[str, _Entry]
    pieces: dict[str, list[str]] | None = None


class _UnsoundError(Exception):
    """A folder is no sound checkpoint; the text is the reason."""


class _IncompleteError(Exception):
    """A piece did not write what it should."""


def misread(file: Path, *faults: str) -> CheckpointError:
    """A sound checkpoint's file says what it cannot say."""
    remedy = "Name another checkpoint in run.resume, or move this one away."
    return CheckpointError(Problem(str(file), fault, remedy) for fault in faults)


def read_json(file: Path) -> Any:
    """What a checkpoint's file says. Raises CheckpointError if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSON that is nested too deep
        raise misread(file, f"cannot be read: {error}.") from error


def read_model(file: Path, model: type[ModelT]) -> ModelT:
    """The same as a model, all of whose fields are checked. Raises CheckpointError with each that is wrong."""
    try:
        return model.model_validate(read_json(file))
    except ValidationError as error:
        raise misread(file, *(f"{_misfit(found)}." for found in error.errors())) from error


def _misfit(found: ErrorDetails) -> str:
    """In one line."""
    shown, message = json.dumps(found["input"], default=str), found["msg"]
    what = "" if found["type"] == "missing" or len(shown) > 60 else f" is {shown}"
    return f"{'.'.join(map(str, found['loc'])) or 'all of it'}{what}: {message[0].lower()}{message[1:]}"


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def _share(folder: Path) -> None:
    """Give all files the rights of any new file: safetensors makes its own readable by their owner alone."""
    rights = stat.S_IMODE(folder.stat().st_mode) & 0o666  # a folder's, less the right to enter it
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):  # some file systems have no rights
                path.chmod(rights)


def write(
    parent: Path, step: int, pieces: Sequence[Piece], states: Sequence[State] | None = None, *, reload: bool = True
) -> Path:
    """Make the checkpoint of `step` below `parent`. One piece after the other is gathered, unless `states` are theirs, and written.

    Called by the process that writes, while all others gather the same pieces. reload: whether a model may be loaded to compare it;
    without, ReloadNeeded is raised where one would be. Raises CheckpointError, and leaves every other checkpoint as it was, if it
    cannot be written.
    """
    final = parent / checkpoint_name(step)
    aside, spool = parent / (checkpoint_name(step) + PARTIAL), parent / SPOOL
    waiting = iter(pieces)
    written: dict[str, list[str]] = {}
    trained: list[tuple[ReadBack, Marks]] = []
    try:
        sweep(parent)
        for folder in (aside, spool):
            folder.mkdir(parents=True)
        for piece in waiting:
            # No name holds a state that was gathered, so that it is gone from memory before the next one comes.
            written[piece.name] = _write_piece(
                aside, piece, piece.gather(keep=spool) if states is None else states[len(written)], trained
            )
        _share(aside)
        _seal(aside, written, trained, reload=reload)
        # A folder cannot be renamed onto one that is not empty. The old one goes only now that the new one is whole.
        old = _put_away(final) if final.exists() else None
        aside.rename(final)
        shutil.rmtree(spool, ignore_errors=True)
        _sync(parent)  # the new name is on the disk only once its folder is
        if old is not None:
            shutil.rmtree(old)
    # safetensors raises its own error for what the disk refuses, which is no OSError.
    except (OSError, SafetensorError, _IncompleteError) as error:
        if states is None:
            for piece in waiting:
                piece.gather(keep=False)  # the other processes do, and would wait for this one
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(spool, ignore_errors=True)
        newest = latest(parent)[0]
        remedy = f"The newest sound checkpoint is {newest}." if newest else "There is no earlier checkpoint."
        if not isinstance(error, _IncompleteError):
            remedy += f" Make room on the disk: a checkpoint takes {bytes_text(sum(piece.bytes for piece in pieces))}."
        what = f"the checkpoint could not be written: {error}."
        raise CheckpointError(Problem(str(final), what, remedy)) from error
    return final


def _put_away(folder: Path) -> Path:
    """Rename a checkpoint that is to be deleted: killed in the middle of that, what is left bears no checkpoint's name."""
    return folder.rename(folder.with_name(f"{folder.name}.old{PARTIAL}"))


def sweep(parent: Path) -> None:
    """Delete what a killed run had not finished writing or deleting, as far as that can be done."""
    shutil.rmtree(parent / SPOOL, ignore_errors=True)
    for path in parent.glob(f"*{PARTIAL}"):
        if CHECKPOINT.fullmatch(path.name.removesuffix(PARTIAL).removesuffix(".old")):
            shutil.rmtree(path, ignore_errors=True)


def _write_piece(folder: Path, piece: Piece, state: State, trained: list[tuple[ReadBack, Marks]]) -> list[str]:
    """Gives the paths of the files that came; trained: takes the marks of what is."""
    if isinstance(piece, ReadBack):
        trained.append((piece, marks_of(state.tensors)))
    before = _files(folder)
    for name in before.intersection(piece.files):
        raise _IncompleteError(f"another piece than {piece.name} wrote its {name}")
    piece.write(folder, state)
    new = _files(folder) - before
    for name in piece.files:
        if name not in new:
            raise _IncompleteError(f"{piece.name} wrote no {name}")
    if not new:
        raise _IncompleteError(f"{piece.name} wrote no file")
    return sorted(new)


def _seal(
    folder: Path, written: Mapping[str, Collection[str]], trained: Collection[tuple[ReadBack, Marks]], *, reload: bool
) -> None:
    """Sync all files, then write the manifest of their sizes and hashes. Reads each file once.

    written: files of each piece. trained: pieces with the marks of what they gathered, which must be on the disk.
    """
    entries = {}
    left = {name for piece, _ in trained for name in written[piece.name]}
    found = {}
    paths = {name: folder / name for name in sorted({name for names in written.values() for name in names})}
    for name, path in paths.items():
        sha256, found[name] = read_through(path, sums=name in left)
        entries[name] = {"size": path.stat().st_size, "sha256": sha256}
        _sync(path)
    for piece, gathered in trained:
        if odd := fault_of(folder, piece, gathered, [found[name] for name in written[piece.name]], reload=reload):
            raise _IncompleteError(odd)
    manifest = folder / MANIFEST
    content = {"format": FORMAT, "files": entries, "pieces": written}
    manifest.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _sync(manifest)
    # A file that is synced can still lack its name: that is in its folder.
    for below in {path.parent for path in paths.values()} | {folder}:
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


def _files(folder: Path) -> set[str]:
    """Paths of all that is no folder, with /, but for the manifest and what file managers leave. Links are followed."""
    found: set[str] = set()
    seen: set[str] = set()  # a link may lead back to where it stands
    for place, below, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            below.clear()  # os.walk goes no further here
            continue
        seen.add(real)
        found |= {Path(place, name).relative_to(folder).as_posix() for name in names if _counts(name)}
    return found - {MANIFEST}


def _refuse(error: OSError) -> None:
    raise error


def _counts(name: str) -> bool:
    return LEFT_BY_FILE_MANAGERS.fullmatch(PurePosixPath(name).name) is None


def fault(folder: Path) -> str | None:
    """Why `folder` is not a sound checkpoint; None if it is.

    It is sound if the files there are those that its manifest lists, no more and no fewer, of that size and content, and if
    each piece has all of its own. What takes no reading is looked at first; then each file is read once.
    """
    try:
        listed = _listed(folder)
        _compare(folder, listed)
        for name, entry in listed.items():
            if read_through(folder / name)[0] != entry.sha256:
                return f"{name} is damaged: its content is not what was written"
    except _UnsoundError as reason:
        return str(reason)
    except OSError as error:
        return f"it cannot be read: {error}"
    return None


def _listed(folder: Path) -> dict[str, _Entry]:
    """The files of the manifest. Raises _UnsoundError when it is none, or leaves out what it should list."""
    manifest = _manifest(folder)
    # An older vtrain listed what file managers leave, too; it may have changed since.
    listed = {name: entry for name, entry in manifest.files.items() if _counts(name)}
    if not listed or manifest.pieces == {}:
        raise _UnsoundError(f"its {MANIFEST} lists no file")
    for name in listed:
        if not _is_plain(name):
            raise _UnsoundError(f"its {MANIFEST} lists {name!r}, which is no path of a file in the folder")
    for piece, own in (manifest.pieces or {}).items():
        if not own:
            raise _UnsoundError(f"its {MANIFEST} lists no file of {piece}")
        for name in own:
            if name not in listed:
                raise _UnsoundError(f"its {MANIFEST} does not list {name}, which {piece} must have")
    return listed


def _manifest(folder: Path) -> _Manifest:
    unreadable = f"its {MANIFEST} cannot be read"
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        # Before its fields are looked at: those of another format may be others, and it is not damaged for that.
        if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
            raise _UnsoundError(f"its format is {content['format']}, and this vtrain reads {FORMAT}")
        return _Manifest.model_validate(content)
    except FileNotFoundError:
        raise _UnsoundError(f"it has no {MANIFEST}, so it was never finished") from None
    except ValidationError as error:
        raise _UnsoundError(f"{unreadable}: {_misfit(error.errors()[0])}") from None
    except (OSError, ValueError, RecursionError) as error:  # JSON that is nested too deep
        raise _UnsoundError(f"{unreadable}: {error}") from None


def _is_plain(name: str) -> bool:
    """Whether it is a path below the folder on every system, spelt in the one way that there is."""
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name and not PureWindowsPath(name).drive
    return inside and str(path) == name and name not in (".", MANIFEST)


def _compare(folder: Path, listed: Mapping[str, _Entry]) -> None:
    """Names and sizes. Raises _UnsoundError."""
    there = _files(folder)
    for name, entry in listed.items():
        path = folder / name
        if name not in there or not path.is_file():  # to open a pipe would wait for its writer
            raise _UnsoundError(f"{name} is missing")
        if path.stat().st_size != entry.size:
            raise _UnsoundError(f"{name} has {path.stat().st_size} bytes instead of {entry.size}")
    for name in sorted(there - listed.keys()):
        raise _UnsoundError(f"it holds {name}, which its {MANIFEST} does not list")


def load(folder: Path, pieces: Sequence[Piece]) -> None:
    """Put the sound checkpoint `folder` into the live objects. Raises CheckpointError if a piece's file is not there."""
    # Every file is looked for before any piece changes what is live.
    for piece in pieces:
        for name in piece.files:
            if not (folder / name).is_file():
                what = f"this checkpoint has no {name}, which {piece.name} must have."
                raise CheckpointError(Problem(str(folder), what, "Name another one in run.resume."))
    for piece in pieces:
        piece.load(folder)


def steps_saved(parent: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all finished-looking checkpoints, oldest first. Nothing is verified."""
    if not parent.is_dir():
        return []
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in parent.iterdir()]
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
    # The newest first: killed in between, those that are left are still a run's, one after the other.
    for _, folder in reversed([each for each in steps_saved(parent) if each[0] > after]):
        turn = 1
        while (target := folder.with_name(f"{folder.name}.left-behind-{turn}")).exists():
            turn += 1
        moved.append(folder.rename(target))
    return moved[::-1]


def prune(parent: Path, keep: int | Literal["all"], newest: Path) -> list[Path]:
    """Delete all but the newest `keep`, once `newest` has verified. Gives what was deleted."""
    saved = [folder for _, folder in steps_saved(parent)]
    gone = saved[:-keep] if keep != "all" else []
    if not gone or newest in gone:  # folders of later steps are there: the new one would go
        return []
    reason = fault(newest)
    if reason is not None:
        raise CheckpointError(
            Problem(str(newest), f"the new checkpoint did not verify: {reason}.", "Older ones are kept.")
        )
    for folder in gone:
        shutil.rmtree(_put_away(folder))
    return gone
