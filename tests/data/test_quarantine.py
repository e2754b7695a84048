"""Bad files are moved out of a dataset: whole, once, never over another file, and only as they were found bad."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtrain.config.data_tables import DataTable
from vtrain.contract import Size, SourceRef
from vtrain.data.scanning.quarantine import MovedFile, quarantine
from vtrain.plan.records import DatasetPlan
from vtrain_builtin.folder import LocalFolder

BAD = "is empty (0 bytes)"


@pytest.fixture
def move(tmp_path: Path) -> Callable[..., list[MovedFile]]:
    """move("a.mp4", ...): the files as they are listed now, unless refs are given."""

    def move(*names: str, refs: list[SourceRef] | None = None, **table: Any) -> list[MovedFile]:
        settings = {"on_bad_file": "move", "quarantine": tmp_path / "bad", **table}
        backend = LocalFolder(str(tmp_path / "clips"))
        plan = DatasetPlan(
            "clips", "", backend, DataTable.model_validate(settings), (Size(64, 64),), 9, 9, 16.0
        )  # fmt: skip
        found = refs if refs is not None else [ref for ref in backend.refs() if ref.id in names]
        return list(quarantine(plan, ((ref, BAD) for ref in found)))

    (tmp_path / "clips").mkdir()
    return move


def add(tmp_path: Path, name: str, data: bytes = b"bad") -> Path:
    file = tmp_path / "clips" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def refs(tmp_path: Path) -> list[SourceRef]:
    return list(LocalFolder(str(tmp_path / "clips")).refs())


def test_a_bad_file_keeps_its_path_and_its_bytes_and_the_others_stay(tmp_path: Path, move) -> None:
    add(tmp_path, "sub/deep/a.mp4", b"bytes")
    good = add(tmp_path, "sub/good.mp4")
    target = tmp_path / "bad" / "sub" / "deep" / "a.mp4"
    assert move("sub/deep/a.mp4") == [MovedFile("clips", "sub/deep/a.mp4", BAD, target)]
    assert target.read_bytes() == b"bytes"
    assert good.exists()
    assert [ref.id for ref in refs(tmp_path)] == ["sub/good.mp4"]


def test_nothing_is_moved_unless_the_settings_say_so(tmp_path: Path, move) -> None:
    file = add(tmp_path, "a.mp4")
    assert move("a.mp4", on_bad_file="skip") == move("a.mp4", on_bad_file="stop") == []
    assert file.exists()


def test_a_file_of_that_name_in_quarantine_is_not_written_over(tmp_path: Path, move) -> None:
    targets = []
    for number in range(3):
        add(tmp_path, "a.mp4", b"%d" % number)
        targets += [moved.target for moved in move("a.mp4")]
    assert [target.name for target in targets] == ["a.mp4", "a.1.mp4", "a.2.mp4"]
    assert [target.read_bytes() for target in targets] == [b"0", b"1", b"2"]


def test_a_file_that_changed_since_or_is_gone_stays(tmp_path: Path, move) -> None:
    file, gone = add(tmp_path, "a.mp4"), add(tmp_path, "b.mp4")
    before = refs(tmp_path)
    file.write_bytes(b"mended")
    gone.unlink()
    moved = move(refs=before)
    assert [(each.target, each.stays) for each in moved] == [(None, "it has changed since, or is gone")] * 2
    assert file.read_bytes() == b"mended"
    assert not list((tmp_path / "bad").rglob("*.mp4"))


def test_a_link_is_moved_and_what_it_points_to_stays(tmp_path: Path, move) -> None:
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(b"mine")
    (tmp_path / "clips" / "a.mp4").symlink_to(outside)
    (tmp_path / "clips" / "dangling.mp4").symlink_to("nothing")
    first, second = move("a.mp4", "dangling.mp4")
    assert first.target.readlink() == outside
    assert second.target.is_symlink()
    assert outside.read_bytes() == b"mine"


def test_a_file_behind_a_linked_folder_stays(tmp_path: Path, move) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.mp4").write_bytes(b"mine")
    (tmp_path / "clips" / "link").symlink_to(outside)
    (moved,) = move("link/a.mp4")
    assert (moved.target, moved.stays) == (None, "it lies outside the dataset, behind a link")
    assert (outside / "a.mp4").exists()


@pytest.mark.parametrize("name", ["../up.mp4", "a/../../up.mp4", "/up.mp4"])
def test_a_name_that_leads_out_of_the_folder_moves_nothing(tmp_path: Path, move, name: str) -> None:
    class Anywhere(LocalFolder):
        def file(self, ref: SourceRef) -> Path:
            return tmp_path / "clips" / "real.mp4"

    real = add(tmp_path, "real.mp4")
    table = DataTable.model_validate({"on_bad_file": "move", "quarantine": tmp_path / "bad"})
    plan = DatasetPlan("clips", "", Anywhere(str(tmp_path / "clips")), table, (), 9, 9, 16.0)
    (moved,) = quarantine(plan, [(SourceRef(name, 3, "1"), BAD)])
    assert (moved.target, moved.stays) == (None, "its name leads out of the folder")
    assert real.exists()


def test_where_a_file_stands_in_the_way_of_a_folder_the_bad_file_stays(tmp_path: Path, move) -> None:
    file = add(tmp_path, "sub/a.mp4")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "sub").write_bytes(b"a file")
    (moved,) = move("sub/a.mp4")
    assert moved.target is None
    assert moved.stays
    assert file.exists()
    assert (tmp_path / "bad" / "sub").read_bytes() == b"a file"


def across(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the quarantine be on another disk: what crosses from the dataset to it cannot be renamed."""
    rename = os.replace

    def replace(self: Path, target: Path) -> Path:
        if (tmp_path / "clips" in self.parents) != (tmp_path / "clips" in Path(target).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(self, target)
        return Path(target)

    monkeypatch.setattr(Path, "replace", replace)


def test_to_another_disk_a_file_is_copied_whole_with_its_time(
    tmp_path: Path, move, monkeypatch: pytest.MonkeyPatch
) -> None:
    across(monkeypatch, tmp_path)
    file = add(tmp_path, "a.mp4", b"bytes" * 1000)
    os.utime(file, ns=(1, 10**18))
    (tmp_path / "clips" / "link.mp4").symlink_to("elsewhere/x.mp4")
    first, second = move("a.mp4", "link.mp4")
    assert first.target.read_bytes() == b"bytes" * 1000
    assert first.target.stat().st_mtime_ns == 10**18
    assert str(second.target.readlink()) == "elsewhere/x.mp4"
    assert sorted(path.name for path in (tmp_path / "bad").iterdir()) == ["a.mp4", "link.mp4"]
    assert refs(tmp_path) == []


def test_a_copy_that_fails_leaves_the_file_and_no_trace(tmp_path: Path, move, monkeypatch: pytest.MonkeyPatch) -> None:
    across(monkeypatch, tmp_path)

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copy2", full)
    file = add(tmp_path, "a.mp4")
    assert move("a.mp4") == [MovedFile("clips", "a.mp4", BAD, None, "No space left on device")]
    assert file.read_bytes() == b"bad"
    assert list((tmp_path / "bad").iterdir()) == []


def test_a_file_that_may_not_be_moved_is_not_copied(tmp_path: Path, move, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    file = add(tmp_path, "a.mp4")
    assert move("a.mp4") == [MovedFile("clips", "a.mp4", BAD, None, "Permission denied")]
    assert file.read_bytes() == b"bad"
    assert list((tmp_path / "bad").iterdir()) == []
