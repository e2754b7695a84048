"""What a run uses of the cache folder, and what lies there: present, missing, damaged, stale."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vtrain.contract import Caption, DataError, Problem, Role
from vtrain.data.caching.columns import MaskColumn, known_key, layout_of
from vtrain.data.caching.entries import DAMAGED, KINDS, PART, SUFFIX, Entries, set_aside
from vtrain.data.caching.stores import Stores
from vtrain.data.sample import Sample
from vtrain.plan.records import Plan

DROPPED = Caption("")
"""What a dropped caption is replaced by, with the role "dropped"."""


def texts(
    plan: Plan, samples: Iterable[Sample], extra: Sequence[tuple[Caption, Role]]
) -> Iterator[tuple[Caption, Role]]:
    """All that a run encodes as text: captions, the dropped caption if any is dropped, and what it needs beside them."""
    for sample in samples:
        for caption in sample.captions:
            yield caption, "prompt"
    if plan.config.train.caption_dropout > 0:
        yield DROPPED, "dropped"
    yield from extra


def wanted(stores: Stores, samples: Iterable[Sample], extra: Sequence[tuple[Caption, Role]]) -> dict[str, Wanted]:
    """By kind. Raises DataError."""
    text = {bytes.fromhex(stores.text_key(caption, role)) for caption, role in texts(stores.plan, samples, extra)}
    found = {"text": _Names(text)} | {kind: _Names() for kind in KINDS if kind != "text"}
    for sample in samples:
        for start in sample.starts:
            for column in stores.columns:
                if not column.covers(sample):
                    continue
                key = known_key(column, sample, start)
                found[column.entries.kind].add(key)
                if isinstance(column, MaskColumn) and key is not None and _is_empty(column, sample, key):
                    break  # nothing else is made of this window
    return {kind: Wanted(frozenset(names.keys), names.unread) for kind, names in found.items()}


def _is_empty(column: MaskColumn, sample: Sample, key: str) -> bool:
    layout = layout_of(column, sample, key)
    return layout is not None and column.is_empty(sample, layout)


@dataclass
class _Names:
    """Keys of one kind while they are found. unread: windows whose file was never read."""

    keys: set[bytes] = field(default_factory=set)
    unread: int = 0

    def add(self, key: str | None) -> None:
        if key is None:
            self.unread += 1
        else:
            self.keys.add(bytes.fromhex(key))


def union(runs: Sequence[dict[str, Wanted]]) -> dict[str, Wanted]:
    """What several runs use together."""
    return {
        kind: Wanted(frozenset().union(*(run[kind].keys for run in runs)), sum(run[kind].unread for run in runs))
        for kind in runs[0]
    }


def check_all_read(all_wanted: dict[str, Wanted], names: str) -> None:
    """Raises DataError if entries that are used have no name yet: they could be taken for others."""
    unread = max(each.unread for each in all_wanted.values())  # a clip that was not read is so in each kind
    if unread:
        what = f"{unread} clips were not read yet, so it is not known which entries are theirs; nothing was deleted."
        raise DataError(Problem(names, what, "Run `vtrain cache fill` first."))


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
