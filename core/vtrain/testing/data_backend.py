"""The rules of a data backend."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import pytest

from vtrain.contract import DataBackend, DataError, SourceRef
from vtrain.testing.draws import required

FILES: Mapping[str, bytes] = {
    "b.mp4": bytes(range(256)) * 40,
    "a.txt": "a cat on a mat, é".encode(),
    "deep/er/clip.mp4": b"inside",
    "deep/empty.mp4": b"",
    "name with spaces and é.mp4": b"x" * 100,
}


def _ref(backend: DataBackend, ref_id: str) -> SourceRef:
    return next(ref for ref in backend.refs() if ref.id == ref_id)


class DataBackendTests:
    """Where files are.

    secrets: words of the backend's options that must not be shown (passwords, tokens).
    """

    secrets: tuple[str, ...] = ()

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
    def missing(self) -> DataBackend:
        """A backend on a place that does not exist. Override it."""
        required("missing", "a DataBackend, built without an error, on a place that does not exist")

    def test_every_file_is_listed_once_sorted_by_id(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """refs gives every file, in deep folders too, sorted by id, none twice."""
        assert [ref.id for ref in backend.refs()] == sorted(files)

    def test_ids_are_relative_with_forward_slashes(self, backend: DataBackend) -> None:
        """An id does not depend on where the place is or on the operating system."""
        for ref in backend.refs():
            assert not ref.id.startswith("/"), ref.id
            assert "\\" not in ref.id, ref.id
            assert ".." not in ref.id.split("/"), ref.id

    def test_sizes_are_true(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """A ref's size is the file's, in bytes."""
        assert {ref.id: ref.size for ref in backend.refs()} == {name: len(data) for name, data in files.items()}

    def test_files_open_to_their_bytes(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """open gives the file's bytes."""
        for ref in backend.refs():
            with backend.open(ref) as file:
                assert file.read() == files[ref.id], ref.id

    def test_open_files_can_be_read_anywhere(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """An open file seeks, as video decoders do: from the start, from here and from the end."""
        data = files["b.mp4"]
        with backend.open(_ref(backend, "b.mp4")) as file:
            assert file.seekable()
            assert file.seek(-10, io.SEEK_END) == len(data) - 10
            assert file.read() == data[-10:]
            file.seek(100)
            assert file.read(5) == data[100:105]
            assert file.tell() == 105

    def test_two_files_are_open_at_once(self, backend: DataBackend, files: Mapping[str, bytes]) -> None:
        """Open files do not share a position."""
        ref = _ref(backend, "b.mp4")
        with backend.open(ref) as first, backend.open(ref) as second:
            first.read(50)
            assert second.read(4) == files["b.mp4"][:4]

    def test_listing_is_repeatable(self, backend: DataBackend) -> None:
        """Asked twice, an unchanged place gives the same refs, versions too."""
        assert list(backend.refs()) == list(backend.refs())

    def test_a_changed_file_has_another_version(
        self, backend: DataBackend, rewrite: Callable[[str, bytes], None]
    ) -> None:
        """Rewriting a file, even at the same size, changes its version; the others keep theirs."""
        before = {ref.id: ref.version for ref in backend.refs()}
        rewrite("deep/er/clip.mp4", b"INSIDE")
        after = {ref.id: ref.version for ref in backend.refs()}
        assert {name for name in before if before[name] != after[name]} == {"deep/er/clip.mp4"}

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
        assert urlsplit(backend.location).password is None
        assert not [secret for secret in self.secrets if secret in backend.location]
