"""What lies in a cache folder, beside what runs want of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vtrain.data.caching.entries import DAMAGED, KINDS, PART, SUFFIX, Entries, set_aside

_KEY = re.compile(r"[0-9a-f]{64}")
_ABANDONED_S = 3600.0
"""A file being written that was not touched for so long is one of a process that was killed."""


@dataclass(frozen=True)
class Wanted:
    """The entries that runs use, of one kind. keys: digests. unread: windows whose file was never read, so that their
    entries have no name yet."""

    keys: frozenset[bytes]
    unread: int = 0


@dataclass
class Tally:
    """A number of files and their bytes."""

    count: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        self.count += 1
        self.bytes += size


@dataclass
class Inventory:
    """One kind of entries in a cache folder.

    wanted: entries that the runs use; present, of these; damaged: of these, as their header and length tell; missing: those
    not there, and windows whose file was never read. stale: entries that these runs do not use (their clip, caption or
    settings changed, or they are another run's). leftovers: what damage and killed processes left. foreign: other files.
    """

    kind: str
    wanted: int
    missing: int = 0
    present: Tally = field(default_factory=Tally)
    damaged: Tally = field(default_factory=Tally)
    stale: Tally = field(default_factory=Tally)
    leftovers: Tally = field(default_factory=Tally)
    foreign: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class File:
    """A file in the cache. key: "" if it is no entry. status: one of an Inventory's tallies."""

    path: Path
    key: str
    status: str
    bytes: int


def files(entries: Entries, wanted: Wanted) -> Iterator[File]:
    """Every file of a kind. An entry that vanishes meanwhile is passed over. Raises DataError."""
    now = time.time()
    for path in entries.files():
        with suppress(FileNotFoundError):
            state = path.stat()
            key = path.stem if path.suffix == SUFFIX and _KEY.fullmatch(path.stem) else ""
            if key and bytes.fromhex(key) in wanted.keys:
                status = "present" if entries.sound(key) else "damaged"
            elif key:
                status = "stale"
            elif path.suffix == DAMAGED or (path.suffix == PART and now - state.st_mtime > _ABANDONED_S):
                status = "leftovers"
            else:
                status = "foreign"
            yield File(path, key, status, state.st_size)


def take(entries: Entries, kind: str, wanted: Wanted) -> Inventory:
    """Look at every file of a kind once. Raises DataError."""
    inventory = Inventory(kind, len(wanted.keys) + wanted.unread)
    tallies = {
        "present": inventory.present, "damaged": inventory.damaged, "stale": inventory.stale,
        "leftovers": inventory.leftovers, "foreign": inventory.foreign,
    }  # fmt: skip
    for file in files(entries, wanted):
        tallies[file.status].add(file.bytes)
    inventory.missing = inventory.wanted - inventory.present.count - inventory.damaged.count
    return inventory


@dataclass(frozen=True)
class Damage:
    """A damaged entry, and where it was moved."""

    path: Path
    reason: str
    aside: Path


def verify(
    folder: Path, on_entry: Callable[[int], None]
) -> tuple[dict[str, int], list[Damage], list[tuple[Path, str]]]:
    """Read every entry of a cache folder and move damaged ones aside.

    on_entry: told the bytes of each. Gives the number of entries by kind, the damaged, and those that could not be read
    and why. Raises DataError if a folder cannot be read.
    """
    counts, damaged, unread = dict.fromkeys(KINDS, 0), list[Damage](), list[tuple[Path, str]]()
    for kind in KINDS:
        entries = Entries(folder, kind)
        for path in _entries(entries):
            try:
                size = path.stat().st_size
                reason = entries.damage(path.stem)
            except FileNotFoundError:  # another run's pruning or repair
                continue
            except OSError as error:
                unread.append((path, error.strerror or str(error)))
                continue
            counts[kind] += 1
            if reason is not None:
                damaged.append(Damage(path, reason, set_aside(path)))
            on_entry(size)
    return counts, damaged, unread


def size(folder: Path) -> int:
    """Bytes of all entries of a cache folder. Raises DataError."""
    total = 0
    for kind in KINDS:
        for path in _entries(Entries(folder, kind)):
            with suppress(OSError):
                total += path.stat().st_size
    return total


def _entries(entries: Entries) -> Iterator[Path]:
    return (path for path in entries.files() if path.suffix == SUFFIX and _KEY.fullmatch(path.stem))


def databases(folder: Path) -> Iterator[File]:
    """SQLite files of the cache folder that were damaged and moved aside, with their journals."""
    for path in sorted(folder.glob("*.sqlite.damaged-*")):
        with suppress(FileNotFoundError):
            yield File(path, "", "leftovers", path.stat().st_size)


def take_databases(folder: Path) -> Inventory:
    """The leftovers among them."""
    inventory = Inventory("sqlite", wanted=0)
    for file in databases(folder):
        inventory.leftovers.add(file.bytes)
    return inventory


def prunable(entries: Entries, wanted: Wanted) -> Iterator[File]:
    """What may be deleted: entries that no given run uses, and leftovers. Raises DataError."""
    return (file for file in files(entries, wanted) if file.status in ("stale", "leftovers"))


def delete(found: Iterable[File], on_file: Callable[[File], None]) -> list[tuple[Path, str]]:
    """Delete files, and folders that are then empty. on_file: told each. Gives what could not be, and why."""
    kept = []
    for file in found:
        try:
            file.path.unlink(missing_ok=True)
        except OSError as error:
            kept.append((file.path, error.strerror or str(error)))
            continue
        on_file(file)
        with suppress(OSError):  # not empty
            file.path.parent.rmdir()
    return kept
