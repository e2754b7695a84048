"""Every rule of the data backend kit fails for a backend that breaks it."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pytest

from vtrain.contract import DataError, Problem, SourceRef, Words
from vtrain.testing import DataBackendTests
from vtrain.testing.data_backend import FILES

Subject = dict[str, Any]

counter = itertools.count(1)


class Memory:
    """A sound backend in memory; its mutants replace members."""

    def __init__(self, files: Mapping[str, bytes] | None = None, location: str = "memory://here") -> None:
        self.files = None if files is None else dict(files)
        self.versions = dict.fromkeys(files or (), 1)
        self.location = location

    def refs(self) -> Iterator[SourceRef]:
        if self.files is None:
            raise DataError(Problem(self.location, "There is no such place."))
        yield from (SourceRef(name, len(data), str(self.versions[name])) for name, data in sorted(self.files.items()))

    def open(self, ref: SourceRef) -> BinaryIO:
        if self.files is None or ref.id not in self.files:
            raise FileNotFoundError(ref.id)
        return io.BytesIO(self.files[ref.id])

    def rewrite(self, name: str, data: bytes) -> None:
        assert self.files is not None
        self.files[name] = data
        self.versions[name] += 1

    def remove(self, name: str) -> None:
        assert self.files is not None
        del self.files[name]


def changed(change: Callable[[list[SourceRef]], Sequence[SourceRef]]) -> Memory:
    """A backend whose list of refs passes through `change`."""
    return type("BrokenMemory", (Memory,), {"refs": lambda self: iter(change(list(Memory.refs(self))))})(FILES)


def opening(opened: Callable[[bytes], object]) -> Memory:
    return type("BrokenMemory", (Memory,), {"open": lambda self, ref: opened(self.files[ref.id])})(FILES)


class Stream(io.BytesIO):
    """A file that cannot be read twice."""

    def seekable(self) -> bool:
        return False


class Sharing(Memory):
    """All readers of a file have one position."""

    shared: dict[str, io.BytesIO]

    def open(self, ref: SourceRef) -> BinaryIO:
        if not hasattr(self, "shared"):
            self.shared = {}
        return self.shared.setdefault(ref.id, io.BytesIO(FILES[ref.id]))


class Racing(Memory):
    """Threads tell each other which file to open."""

    def open(self, ref: SourceRef) -> BinaryIO:
        self.wanted = ref.id
        time.sleep(0.002)
        assert self.files is not None
        return io.BytesIO(self.files[self.wanted])


class Stamped(Memory):
    """Its versions are those of this process: every file is new in another one."""

    def refs(self) -> Iterator[SourceRef]:
        yield from (SourceRef(ref.id, ref.size, f"{ref.version} {id(self)}") for ref in super().refs())


class Forgiving(Memory):
    """It opens what is gone as an empty file."""

    def open(self, ref: SourceRef) -> BinaryIO:
        return io.BytesIO((self.files or {}).get(ref.id, b""))


class Shards(Memory):
    """A sound backend whose shards are the first letters of names; its mutants replace members."""

    def __init__(self, files: Mapping[str, bytes] | None = None, location: str = "memory://shards") -> None:
        super().__init__(None if files is None else {f"{name[0]}.tar/{name}": data for name, data in files.items()})
        self.location = location

    def shards(self) -> Iterator[SourceRef]:
        names: dict[str, list[int]] = {}
        for ref in Memory.refs(self):
            names.setdefault(ref.id.partition("/")[0], []).append(int(ref.version))
        yield from (SourceRef(name, 100, str(sum(versions))) for name, versions in sorted(names.items()))

    def members(self, shard: SourceRef) -> Iterator[SourceRef]:
        found = [ref for ref in Memory.refs(self) if ref.id.startswith(f"{shard.id}/")]
        if not found:
            raise FileNotFoundError(shard.id)
        yield from found


SHARDED = {f"{name[0]}.tar/{name}": data for name, data in FILES.items()}

REWRITTEN = "d.tar/deep/er/clip.mp4"

WORDS = {
    "b.mp4": Words(("a red ball", "a ball"), {"pace": 7}),
    "deep/er/clip.mp4": Words(("a blue ball",)),
}


class Captions(Memory):
    """A sound backend with captions of its own; its mutants replace members."""

    def captions(self, extras: Sequence[str] = ()) -> Iterator[tuple[str, Words]]:
        if self.files is None:
            raise DataError(Problem(self.location, "There is no such place."))
        yield from sorted(WORDS.items())


class Request:
    """The fixture request of the kit's test, for its words."""

    def getfixturevalue(self, name: str) -> Mapping[str, Words]:
        assert name == "words"
        return WORDS


def shards(**members: object) -> Subject:
    return {"backend": type("BrokenShards", (Shards,), members)(FILES)}


def rewriting(part: Memory, files: Mapping[str, bytes]) -> Subject:
    return {"backend": part, "files": files, "rewrite": part.rewrite}


def captions(change: Callable[[list[tuple[str, Words]]], object]) -> Memory:
    """A backend whose captions pass through `change`."""
    members = {"captions": lambda self, extras=(): change(sorted(WORDS.items()))}
    return type("BrokenCaptions", (Captions,), members)(FILES)


class Timeless(Memory):
    def rewrite(self, name: str, data: bytes) -> None:
        assert self.files is not None
        self.files[name] = data


def backend(part: Memory) -> Subject:
    return {"backend": part}


def with_files(part: Memory) -> Subject:
    return {"backend": part, "files": FILES}


PLANTED: tuple[tuple[str, str, str, Callable[[], Subject]], ...] = (
    (
        "files in another order",
        "test_every_file_is_listed_once_sorted_by_id",
        "refs are other ids than `files`, or in another order",
        lambda: with_files(changed(lambda refs: refs[::-1])),
    ),
    (
        "`file` that was renamed",
        "test_it_has_the_abilities_that_its_author_expects",
        "the data backend has lost SupportsFiles: it has no file",
        lambda: backend(Memory(FILES)),
    ),
    (
        "versions that are those of this process",
        "test_a_copy_lists_and_opens_the_same",
        "a copy that was made before the first listing lists otherwise",
        lambda: with_files(Stamped(FILES)),
    ),
    (
        "empty bytes for a file that is gone",
        "test_a_vanished_file_is_an_os_error_in_words",
        "DID NOT RAISE",
        lambda: {"backend": (part := Forgiving(FILES)), "remove": part.remove},
    ),
    (
        "`captoins` for `captions`",
        "test_abilities_of_the_backend_are_spelt_right",
        "for captions of SupportsCaptions?",
        lambda: backend(type("BrokenMemory", (Memory,), {"captoins": lambda self: iter(())})(FILES)),
    ),
    (
        "ids that begin with a slash",
        "test_ids_are_relative_with_forward_slashes",
        "the id /a.txt is absolute",
        lambda: backend(changed(lambda refs: [SourceRef("/" + ref.id, ref.size, ref.version) for ref in refs])),
    ),
    (
        "an empty file of one byte",
        "test_sizes_are_true",
        "deep/empty.mp4 is said to have 1 bytes, not 0",
        lambda: with_files(changed(lambda refs: [SourceRef(ref.id, max(ref.size, 1), ref.version) for ref in refs])),
    ),
    (
        "the first 64 bytes of each file",
        "test_files_open_to_their_bytes",
        "opens to other bytes",
        lambda: with_files(opening(lambda data: io.BytesIO(data[:64]))),
    ),
    (
        "a stream in place of a file",
        "test_open_files_can_be_read_anywhere",
        "an open file is not seekable",
        lambda: with_files(opening(Stream)),
    ),
    (
        "one handle for all readers of a file",
        "test_two_files_are_open_at_once",
        "two open files share a position",
        lambda: with_files(Sharing(FILES)),
    ),
    (
        "the file to open kept in an attribute",
        "test_threads_open_files_at_once",
        "beside other threads",
        lambda: with_files(Racing(FILES)),
    ),
    (
        "all refs in a list",
        "test_refs_come_one_by_one",
        "refs returns a collection",
        lambda: backend(type("BrokenMemory", (Memory,), {"refs": lambda self: list(Memory.refs(self))})(FILES)),
    ),
    (
        "versions that count listings",
        "test_listing_is_repeatable",
        "a second listing of an unchanged place differs",
        lambda: backend(changed(lambda refs: [SourceRef(ref.id, ref.size, str(next(counter))) for ref in refs])),
    ),
    (
        "a version that a rewritten file keeps",
        "test_a_changed_file_has_another_version",
        "was rewritten and has the version that it had",
        lambda: rewriting(Timeless(FILES), FILES),
    ),
    (
        "the first shard forgotten",
        "test_shards_hold_every_file",
        "members of all shards are not refs",
        lambda: shards(shards=lambda self: iter(list(Shards.shards(self))[1:])),
    ),
    (
        "shards without a version",
        "test_a_changed_file_changes_its_shard",
        "a file of ['d.tar'] was rewritten",
        lambda: rewriting(
            type(
                "BrokenShards",
                (Shards,),
                {"shards": lambda self: (SourceRef(s.id, 100, "") for s in Shards.shards(self))},
            )(FILES),
            SHARDED,
        ),
    ),
    (
        "no members of a shard that is not there",
        "test_an_absent_shard_is_an_os_error",
        "DID NOT RAISE",
        lambda: shards(members=lambda self, shard: iter(())),
    ),
    (
        "captions in another order",
        "test_captions_come_with_their_clips",
        "captions are not `words`, or not sorted by id",
        lambda: {
            "backend": captions(lambda found: iter(found[::-1])),
            "request": Request(),
        },
    ),
    (
        "captions of a clip that is not there",
        "test_captions_are_of_files_that_are_listed",
        "captions are of deep/none.mp4, which refs does not list",
        lambda: backend(captions(lambda found: iter([*found, ("deep/none.mp4", Words(("nothing",)))]))),
    ),
    (
        "no captions of a place that is not there",
        "test_captions_of_a_missing_place_are_a_data_error",
        "DID NOT RAISE",
        lambda: {"missing": type("BrokenCaptions", (Captions,), {"captions": lambda self, extras=(): iter(())})(None)},
    ),
    (
        "an empty text for an extra that is not there",
        "test_extras_that_are_not_there_are_skipped",
        "empty extras: b.mp4",
        lambda: backend(captions(lambda found: iter([("b.mp4", Words(("a red ball",), {"no_such_extra": ""}))]))),
    ),
    (
        "empty bytes for an id that never was",
        "test_an_absent_file_is_an_os_error",
        "DID NOT RAISE",
        lambda: backend(type("BrokenMemory", (Memory,), {"open": lambda self, ref: io.BytesIO()})(FILES)),
    ),
    (
        "no files of a place that is not there",
        "test_a_missing_place_is_a_data_error",
        "DID NOT RAISE",
        lambda: {"missing": Memory({})},
    ),
    (
        "a password in the location",
        "test_the_location_names_the_place_without_secrets",
        "location shows a password",
        lambda: {
            "backend": Memory(FILES, "https://me:secret@host/clips"),
            "missing": Memory(None, "memory://nowhere"),
        },
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the arguments with the mistake in them)."""


@pytest.mark.parametrize(("rule", "says", "subject"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_a_data_backend_that_breaks_it(
    rule: str, says: str, subject: Callable[[], Subject], breaks: Callable[..., None]
) -> None:
    kit, given = DataBackendTests(), subject()
    kit.expects = frozenset({"SupportsFiles"} if "expects" in rule else ())
    if isinstance(given.get("backend"), Shards):
        kit.rewritten = REWRITTEN
    breaks(kit, rule, given, says)


def test_a_backend_that_cannot_be_pickled_is_found() -> None:
    place = Memory(FILES)
    place.read = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="pickle"):
        DataBackendTests().test_a_copy_lists_and_opens_the_same(place, FILES)


def test_every_rule_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(DataBackendTests) == {rule for _, rule, _, _ in PLANTED}


class TestASoundBackend(DataBackendTests):
    """What the mutants are made from passes every rule."""

    kind: type[Memory] = Memory

    @pytest.fixture
    def backend(self) -> Memory:
        return self.kind(FILES)

    @pytest.fixture
    def rewrite(self, backend: Memory) -> Callable[[str, bytes], None]:
        return backend.rewrite

    @pytest.fixture
    def remove(self, backend: Memory) -> Callable[[str], None]:
        return backend.remove

    @pytest.fixture
    def missing(self) -> Memory:
        return self.kind(None, "memory://nowhere")


class TestSoundShards(TestASoundBackend):
    """So does what the mutants with shards are made from."""

    kind, rewritten = Shards, REWRITTEN

    @pytest.fixture
    def files(self) -> Mapping[str, bytes]:
        return SHARDED


class TestSoundCaptions(TestASoundBackend):
    """And what the mutants with captions are made from."""

    kind = Captions

    @pytest.fixture
    def words(self) -> Mapping[str, Words]:
        return WORDS
