"""What a run uses of the cache folder: where it lies, and which entries are present, missing, damaged, stale. No torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vtrain.contract import Caption, DataError, Problem, Role, TextEncoderSpec
from vtrain.data.caching.artifacts import (
    Artifact,
    Contents,
    FeatureArtifact,
    MaskArtifact,
    VideoArtifact,
    known_key,
    layout_of,
)
from vtrain.data.caching.entries import DAMAGED, KINDS, PART, SUFFIX, Entries, set_aside, text_key
from vtrain.data.sample import Sample
from vtrain.data.scanning.database import HASHES, FileHashes
from vtrain.plan.records import Plan
from vtrain.plan.text import text_fingerprints


class Stores:
    """The cache folder as this run sees it. Fingerprints are taken at their first use: they hash weights.

    masks, videos, features: the artifacts, the last by regularizer. masks: None where no dataset has any.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        folder = plan.config.cache.dir
        compress = plan.config.cache.compress
        self.text, self.video, self.feature, self.mask = (Entries(folder, kind, compress=compress) for kind in KINDS)
        self._hash_file = FileHashes(folder / HASHES)
        contents = Contents(plan)
        self.masks = MaskArtifact(plan, contents, self.mask) if any(each.masks for each in plan.datasets) else None
        self.videos = VideoArtifact(plan, contents, self.video, self._hash_file)
        self.features = {
            name: FeatureArtifact(plan, contents, self.feature, self._hash_file, name, part)
            for name, part in plan.regularizers
            if part.needs().features == "cached"
        }

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """In the order in which they are filled: a clip whose mask is empty is not encoded."""
        masks = () if self.masks is None else (self.masks,)
        return (*masks, self.videos, *self.features.values())

    @cached_property
    def encoders(self) -> Mapping[str, TextEncoderSpec]:
        """Of text, by name."""
        return self.plan.family.text_encoders()

    @cached_property
    def _text_fingerprints(self) -> dict[str, str]:
        return text_fingerprints(self.plan.family, self._hash_file)

    def location(self, sample: Sample) -> str:
        """The place of the sample's dataset in the ledger."""
        return self.plan.datasets[sample.place].backend.location

    def text_key(self, encoder: str, caption: Caption, role: Role) -> str:
        """encoder: its name."""
        return text_key(caption, role, self._text_fingerprints[encoder])

    def text_keys(self, caption: Caption, role: Role) -> tuple[str, ...]:
        """One for each encoder, in their order."""
        return tuple(self.text_key(name, caption, role) for name in self.encoders)

    def video_key(self, sample: Sample, start: float, content: str) -> str:
        """start: one of the sample's. content: SHA-256 of the source's bytes."""
        return self.videos.key(sample, start, content)

    def known_content(self, sample: Sample) -> str:
        """The content hash that the sample carries or that the ledger has; "" if the source's bytes were not read yet."""
        return self.videos.content(sample)

    def known_video_key(self, sample: Sample, start: float) -> str | None:
        """By the content hash, if that is known."""
        return known_key(self.videos, sample, start)


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
    used = texts(stores.plan, samples, extra)
    text = {bytes.fromhex(key) for caption, role in used for key in stores.text_keys(caption, role)}
    found = {"text": _KeySet(text)} | {kind: _KeySet() for kind in KINDS if kind != "text"}
    for sample in samples:
        for start in sample.starts:
            for artifact in stores.artifacts:
                if not artifact.covers(sample):
                    continue
                key = known_key(artifact, sample, start)
                found[artifact.entries.kind].add(key)
                if isinstance(artifact, MaskArtifact) and key is not None and _is_empty(artifact, sample, key):
                    break  # nothing else is made of this window
    return {kind: Wanted(frozenset(names.keys), names.unread) for kind, names in found.items()}


def _is_empty(artifact: MaskArtifact, sample: Sample, key: str) -> bool:
    layout = layout_of(artifact, sample, key)
    return layout is not None and artifact.is_empty(sample, layout)


@dataclass
class _KeySet:
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
class CacheFile:
    """A file in the cache. key: "" if it is no entry. status: one of an Inventory's tallies."""

    path: Path
    key: str
    status: str
    bytes: int


def files(entries: Entries, wanted: Wanted) -> Iterator[CacheFile]:
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
            yield CacheFile(path, key, status, state.st_size)


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


def databases(folder: Path) -> Iterator[CacheFile]:
    """SQLite files of the cache folder that were damaged and moved aside, with their journals."""
    for path in sorted(folder.glob("*.sqlite.damaged-*")):
        with suppress(FileNotFoundError):
            yield CacheFile(path, "", "leftovers", path.stat().st_size)


def take_databases(folder: Path) -> Inventory:
    """The leftovers among them."""
    inventory = Inventory("sqlite", wanted=0)
    for file in databases(folder):
        inventory.leftovers.add(file.bytes)
    return inventory


def prunable(entries: Entries, wanted: Wanted) -> Iterator[CacheFile]:
    """What may be deleted: entries that no given run uses, and leftovers. Raises DataError."""
    return (file for file in files(entries, wanted) if file.status in ("stale", "leftovers"))


def delete(found: Iterable[CacheFile], on_file: Callable[[CacheFile], None]) -> list[tuple[Path, str]]:
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
