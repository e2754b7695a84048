"""The rules of a data backend."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from urllib.parse import urlsplit

import pytest

from vtrain.contract import DataBackend, DataError, SourceRef, SupportsCaptions, SupportsShards, Words
from vtrain.testing.sampler import check_expected, check_names, required

FILES: Mapping[str, bytes] = {
    "b.mp4": bytes(range(256)) * 40,
    "a.txt": "a cat on a mat, é".encode(),
    "deep.mp4": b"beside the folder of that name",
    "deep/er/clip.mp4": b"inside",
    "deep/empty.mp4": b"",
    "name with spaces and é.mp4": b"x" * 100,
}


def _ref(backend: DataBackend, ref_id: str) -> SourceRef:
    return next(ref for ref in backend.refs() if ref.id == ref_id)


def _largest(files: Mapping[str, bytes]) -> str:
    return max(files, key=lambda name: len(files[name]))


def sharded(backend: DataBackend) -> SupportsShards:
    if not isinstance(backend, SupportsShards):
        pytest.skip("this backend's files do not lie in shards (SupportsShards)")
    return backend


def captioned(backend: DataBackend) -> SupportsCaptions:
    if not isinstance(backend, SupportsCaptions):
        pytest.skip("this backend has no captions of its own (SupportsCaptions)")
    return backend


class DataBackendTests:
    """Where files are.

    secrets: words of the backend's options that must not be shown (passwords, tokens).
    rewritten: the id of the file that the test of versions rewrites; the test of vanished files removes it.
    expects: names of the optional protocols (SupportsShards ...) that it is meant to have.
    """

    expects: frozenset[str] = frozenset()
    secrets: tuple[str, ...] = ()
    rewritten: str = "deep/er/clip.mp4"

    @pytest.fixture
    def files(self) -> Mapping[str, bytes]:
        """id -> content: what `backend` must hold, and nothing else."""
        return FILES

    @pytest.fixture
    def backend(self, files: Mapping[str, bytes]) -> DataBackend:
        """A backend on a place that holds `files`. Override it."""
        required("backend", "a DataBackend on a fresh place that holds the fixture `files` (id -> bytes)")

    @pytest.fixture
    def rewrite(self) -> Callable[[str, bytes], None]:
        """Replaces a file's content at the place of `backend`. Override it."""
        required("rewrite", "a function (id, bytes) that replaces a file at the place of `backend`")

    @pytest.fixture
    def remove(self) -> Callable[[str], None]:
        """Removes a file at the place of `backend`. Override it."""
        pytest.skip("give a fixture `remove`, a function (id) that removes a file at the place of `backend`")

    @pytest.fixture
    def missing(self) -> DataBackend:
        """A backend on a place that does not exist. Override it."""
        required("missing", "a DataBackend, built without an error, on a place that does not exist")

    @pytest.fixture
    def words(self) -> Mapping[str, Words]:
        """id -> what a backend with captions of its own says. Override it for such a backend."""
        required("words", "a mapping id -> Words: the captions that `backend` has of its own")

    def test_every_file_is_listed_once_sorted_by_id(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """refs gives every file, in deep folders too, sorted by id, none twice."""
        assert [ref.id for ref in backend.refs()] == sorted(files), (
            "refs are other ids than `files`, or in another order"
        )

    def test_abilities_of_the_backend_are_spelt_right(self, backend: DataBackend) -> None:
        """No public name of the backend is almost that of an ability which it lacks."""
        check_names("data backend", backend)

    def test_it_has_the_abilities_that_its_author_expects(self, backend: DataBackend) -> None:
        """Each name in `expects` is a protocol that the backend has."""
        check_expected(self.expects, {"data backend": backend})

    def test_ids_are_relative_with_forward_slashes(self, backend: DataBackend) -> None:
        """An id does not depend on where the place is or on the operating system."""
        for ref in backend.refs():
            assert not ref.id.startswith("/"), f"the id {ref.id} is absolute"
            assert "\\" not in ref.id, f"the id {ref.id} has a backslash"
            assert ".." not in ref.id.split("/"), f"the id {ref.id} leads out of the place"

    def test_sizes_are_true(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """A ref's size is the file's, in bytes."""
        for ref in backend.refs():
            assert ref.size == len(files[ref.id]), (
                f"{ref.id} is said to have {ref.size} bytes, not {len(files[ref.id])}"
            )

    def test_files_open_to_their_bytes(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """open gives the file's bytes."""
        for ref in backend.refs():
            with backend.open(ref) as file:
                assert file.read() == files[ref.id], f"{ref.id} opens to other bytes"

    def test_open_files_can_be_read_anywhere(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """An open file seeks, as video decoders do: from the start, from here and from the end."""
        name = _largest(files)
        data = files[name]
        with backend.open(_ref(backend, name)) as file:
            assert file.seekable(), "an open file is not seekable"
            assert file.seek(-10, io.SEEK_END) == len(data) - 10
            assert file.read() == data[-10:]
            file.seek(100)
            assert file.read(5) == data[100:105]
            assert file.tell() == 105

    def test_two_files_are_open_at_once(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """Open files do not share a position."""
        ref = _ref(backend, _largest(files))
        with backend.open(ref) as first, backend.open(ref) as second:
            first.read(50)
            assert second.read(4) == files[ref.id][:4], "two open files share a position"

    def test_threads_open_files_at_once(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """Several threads open and read files of one backend, each its own."""

        def content(ref: SourceRef) -> tuple[str, bytes]:
            with backend.open(ref) as file:
                return ref.id, file.read()

        with ThreadPoolExecutor(4) as threads:
            for name, data in threads.map(content, list(backend.refs()) * 4):
                assert data == files[name], f"beside other threads {name} opens to other bytes"

    def test_refs_come_one_by_one(self, backend: DataBackend) -> None:
        """refs is an iterator, so that a million files are never a list; one that is not used up can be thrown away."""
        refs = backend.refs()
        assert iter(refs) is refs, "refs returns a collection"
        first = next(refs)
        del refs
        assert next(backend.refs()) == first

    def test_listing_is_repeatable(self, backend: DataBackend) -> None:
        """Asked twice, an unchanged place gives the same refs, versions too."""
        assert list(backend.refs()) == list(backend.refs()), "a second listing of an unchanged place differs"

    def test_a_copy_lists_and_opens_the_same(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """A backend goes to another process by pickle, after it was used too; there it gives the same refs and bytes."""
        fresh = pickle.dumps(backend)
        refs = list(backend.refs())
        used = pickle.dumps(backend)
        for copied, several in ((used, refs[:1]), (fresh, refs)):
            other: DataBackend = pickle.loads(copied)  # noqa: S301 (made above)
            assert other.location == backend.location
            for ref in several:
                with other.open(ref) as file:
                    assert file.read() == files[ref.id], f"in a copy {ref.id} opens to other bytes"
        assert list(other.refs()) == refs, "a copy that was made before the first listing lists otherwise"

    def test_a_vanished_file_is_an_os_error_in_words(self, remove: Callable[[str], None], backend: DataBackend) -> None:
        """A file that is removed after refs gave it is an OSError that says why, not empty bytes; a run adds the file's name."""
        ref = _ref(backend, self.rewritten)
        remove(self.rewritten)
        with pytest.raises(OSError, match=r"\w"), backend.open(ref) as file:
            file.read()

    def test_a_changed_file_has_another_version(
        self, backend: DataBackend, files: Mapping[str, bytes], rewrite: Callable[[str, bytes], None]
    ) -> None:
        """Rewriting a file, even at the same size, changes its version; the others, but those in its shard, keep theirs."""
        before = {ref.id: ref.version for ref in backend.refs()}
        rewrite(self.rewritten, files[self.rewritten].swapcase())
        after = {ref.id: ref.version for ref in backend.refs()}
        changed = {name for name in before if before[name] != after[name]}
        assert self.rewritten in changed, f"{self.rewritten} was rewritten and has the version that it had"
        shards = [shard.id for shard in backend.shards()] if isinstance(backend, SupportsShards) else []
        own = [f"{shard}/" for shard in shards if self.rewritten.startswith(f"{shard}/")]
        assert [name for name in changed if name != self.rewritten and not name.startswith(tuple(own))] == []

    def test_shards_hold_every_file(self, backend: DataBackend) -> None:
        """shards are sorted by id, none twice; their members, in order, are what refs gives, each below its shard's id."""
        part = sharded(backend)
        shards = list(part.shards())
        assert [shard.id for shard in shards] == sorted({shard.id for shard in shards})
        members = {shard.id: list(part.members(shard)) for shard in shards}
        assert list(chain.from_iterable(members.values())) == list(backend.refs()), "members of all shards are not refs"
        for shard, refs in members.items():
            assert not [ref.id for ref in refs if not ref.id.startswith(f"{shard}/")], shard

    def test_a_changed_file_changes_its_shard(
        self, backend: DataBackend, files: Mapping[str, bytes], rewrite: Callable[[str, bytes], None]
    ) -> None:
        """Rewriting a file, even at the same size, changes the version of the shard that holds it, and of no other."""
        part = sharded(backend)
        before = {shard.id: shard.version for shard in part.shards()}
        rewrite(self.rewritten, files[self.rewritten].swapcase())
        after = {shard.id: shard.version for shard in part.shards()}
        changed = [shard for shard in before if before[shard] != after[shard]]
        own = [shard for shard in before if self.rewritten.startswith(f"{shard}/")]
        assert changed == own, f"a file of {own} was rewritten, and another version have {changed}"

    def test_an_absent_shard_is_an_os_error(self, backend: DataBackend) -> None:
        """members raises OSError for a shard that is not there."""
        part = sharded(backend)
        with pytest.raises(OSError, match=r".*"):
            list(part.members(SourceRef("no such shard.tar", 100, "")))

    def test_captions_come_with_their_clips(self, backend: DataBackend, request: pytest.FixtureRequest) -> None:
        """captions gives each clip's words, sorted by id, none twice, one by one."""
        part = captioned(backend)
        words: Mapping[str, Words] = request.getfixturevalue("words")
        given = part.captions()
        assert iter(given) is given, "captions returns a collection"
        assert list(given) == sorted(words.items()), "captions are not `words`, or not sorted by id"

    def test_captions_are_of_files_that_are_listed(self, backend: DataBackend) -> None:
        """Every id that captions gives is one that refs gives; texts are texts."""
        part = captioned(backend)
        ids = {ref.id for ref in backend.refs()}
        for name, words in part.captions():
            assert name in ids, f"captions are of {name}, which refs does not list"
            assert isinstance(words.texts, tuple)
            assert all(isinstance(text, str) for text in words.texts), name

    def test_extras_that_are_not_there_are_skipped(self, backend: DataBackend) -> None:
        """captions is asked for extras by name: what the place does not have changes nothing, and is no empty value."""
        part = captioned(backend)
        asked = list(part.captions(["no_such_extra"]))
        assert asked == list(part.captions(()))
        empty = [name for name, words in asked if any(value in (None, "") for value in words.extras.values())]
        assert not empty, f"empty extras: {', '.join(empty)}"

    def test_captions_of_a_missing_place_are_a_data_error(self, missing: DataBackend) -> None:
        """captions raises DataError for a place that does not exist, with a remedy in it."""
        part = captioned(missing)
        with pytest.raises(DataError) as caught:
            list(part.captions())
        assert all(problem.what for problem in caught.value.problems)

    def test_an_absent_file_is_an_os_error(self, backend: DataBackend) -> None:
        """open raises OSError for an id that is not there."""
        with pytest.raises(OSError, match=r".*"):
            backend.open(SourceRef("no such file.mp4", 0, "")).close()

    def test_a_missing_place_is_a_data_error(self, missing: DataBackend) -> None:
        """refs raises DataError for a place that does not exist, with a remedy in it."""
        with pytest.raises(DataError) as caught:
            list(missing.refs())
        assert all(problem.what for problem in caught.value.problems)

    def test_the_location_names_the_place_without_secrets(self, backend: DataBackend, missing: DataBackend) -> None:
        """location is the same each time, differs between places and shows no password or token."""
        assert backend.location == backend.location
        assert backend.location != missing.location
        assert urlsplit(backend.location).password is None, "location shows a password"
        assert not [secret for secret in self.secrets if secret in backend.location]
