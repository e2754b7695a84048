"""The folder backend, on a local folder and behind a URL."""

import os
from pathlib import Path

import fsspec
import pytest
from pydantic import ValidationError

from vtrain.contract import DataError, SourceRef
from vtrain_builtin.folder import FOLDER, FolderOptions, LocalFolder, RemoteFolder


def build(path: object, folder: Path | None = None):
    context = {"folder": folder} if folder else None
    return FOLDER.build(FolderOptions.model_validate({"path": str(path)}, context=context))


@pytest.fixture
def files(tmp_path):
    root = tmp_path / "clips"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "b.mp4").write_bytes(b"bb")
    (root / "sub" / "a.mp4").write_bytes(b"a")
    (root / "sub.mp4").write_bytes(b"")
    (root / "sub" / "deep" / "c.txt").write_text("c")
    return root


def test_every_file_is_listed_sorted_by_id_with_size_and_version(files) -> None:
    refs = list(build(files).refs())
    assert [(ref.id, ref.size) for ref in refs] == [
        ("b.mp4", 2),
        ("sub.mp4", 0),
        ("sub/a.mp4", 1),
        ("sub/deep/c.txt", 1),
    ]
    assert refs[0].version == str((files / "b.mp4").stat().st_mtime_ns)


def test_the_version_changes_with_the_file_to_the_nanosecond(files) -> None:
    before = next(build(files).refs())
    status = (files / "b.mp4").stat()
    os.utime(files / "b.mp4", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert next(build(files).refs()).version != before.version


def test_a_listed_file_opens_and_can_be_sought(files) -> None:
    with build(files).open(SourceRef("sub/a.mp4", 0, "")) as stream:
        assert stream.read() == b"a"
        assert stream.seek(0) == 0
    with pytest.raises(FileNotFoundError):
        build(files).open(SourceRef("none.mp4", 0, ""))


def test_a_relative_path_starts_at_the_configuration_file(files) -> None:
    assert build("clips", folder=files.parent).location == str(files)
    assert build("../clips/./sub", folder=files).location == str(files / "sub")


def test_linked_folders_are_followed_once_and_a_loop_ends(files, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "linked.mp4").write_bytes(b"l")
    (files / "link").symlink_to(other)
    (files / "loop").symlink_to(files)
    ids = [ref.id for ref in build(files).refs()]
    assert "link/linked.mp4" in ids
    assert [name for name in ids if Path(name).name == "b.mp4"] == ["b.mp4"]


def test_a_link_to_nothing_is_listed_so_that_it_is_reported(files) -> None:
    (files / "dead.mp4").symlink_to(files / "gone.mp4")
    assert SourceRef("dead.mp4", 0, "unreadable") in list(build(files).refs())


@pytest.mark.parametrize(("name", "what"), [("missing", "does not exist"), ("b.mp4", "is not a folder")])
def test_a_place_that_is_no_folder_is_an_error_that_names_it(files, name, what) -> None:
    with pytest.raises(DataError, match=what) as caught:
        list(build(files / name).refs())
    assert caught.value.problems[0].where == str(files / name)


def test_a_folder_behind_a_url_is_listed_and_read_in_place() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/clips/a.mp4": b"aa", "/bucket/clips/sub/b.txt": b"b", "/bucket/other.mp4": b"o"})
    try:
        backend = build("memory://bucket/clips")
        assert isinstance(backend, RemoteFolder)
        refs = list(backend.refs())
        assert [(ref.id, ref.size) for ref in refs] == [("a.mp4", 2), ("sub/b.txt", 1)]
        with backend.open(SourceRef("a.mp4", 0, "")) as stream:
            assert stream.read() == b"aa"
        memory.pipe("/bucket/clips/a.mp4", b"xx")
        assert next(backend.refs()).version != refs[0].version
        with pytest.raises(DataError, match="does not exist"):
            list(build("memory://bucket/nothing").refs())
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_storage_that_is_not_installed_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match="cannot be listed"):
        list(build("nosuchstorage://bucket/clips").refs())


def test_a_location_carries_no_secret() -> None:
    assert build("https://me@host/clips/?token=abc#x").location == "https://host/clips"


def test_options_take_one_path_and_nothing_else() -> None:
    with pytest.raises(ValidationError):
        FolderOptions.model_validate({})
    with pytest.raises(ValidationError):
        FolderOptions.model_validate({"path": "a", "pth": "b"})
    with pytest.raises(ValidationError):
        FolderOptions.model_validate({"path": 3})
    assert isinstance(build("a"), LocalFolder)
