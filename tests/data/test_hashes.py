"""Content hashes of model files."""

import hashlib
import os
import sqlite3

import pytest

from vtrain.data.scanning.database import FileHashes


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights" * 1000)
    return file


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_hashed_once_and_remembered(tmp_path, weights) -> None:
    hashes = FileHashes(tmp_path / "cache" / "hashes.sqlite")
    assert hashes(weights) == sha256(weights.read_bytes())
    status = weights.stat()
    weights.write_bytes(b"WEIGHTS" * 1000)  # same size; time of change put back: to the memory it is the same file
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert FileHashes(hashes.path)(weights) == sha256(b"weights" * 1000)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_change_of_size_or_time_hashes_again(tmp_path, weights, change) -> None:
    hashes = FileHashes(tmp_path / "hashes.sqlite")
    hashes(weights)
    status = weights.stat()
    new = b"weights" * 1001 if change == "size" else b"WEIGHTS" * 1000
    weights.write_bytes(new)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + (change == "time")))
    assert hashes(weights) == sha256(new)


def test_a_hub_snapshots_link_is_its_blobs_name_and_nothing_is_read(tmp_path) -> None:
    name = sha256(b"the real content")
    blob = tmp_path / "blobs" / name
    snapshot = tmp_path / "snapshots" / "rev" / "model.safetensors"
    blob.parent.mkdir()
    snapshot.parent.mkdir(parents=True)
    blob.write_bytes(b"something else, to see that it is not read")
    snapshot.symlink_to(blob)
    assert FileHashes(tmp_path / "hashes.sqlite")(snapshot) == name
    assert not (tmp_path / "hashes.sqlite").exists()


def test_a_small_hub_file_named_by_git_is_read(tmp_path) -> None:
    blob = tmp_path / "blobs" / ("a" * 40)
    blob.parent.mkdir()
    blob.write_bytes(b"{}")
    (tmp_path / "config.json").symlink_to(blob)
    assert FileHashes(tmp_path / "hashes.sqlite")(tmp_path / "config.json") == sha256(b"{}")


def test_a_damaged_memory_is_made_anew(tmp_path, weights) -> None:
    path = tmp_path / "hashes.sqlite"
    path.write_bytes(b"garbage" * 500)
    assert FileHashes(path)(weights) == sha256(weights.read_bytes())
    assert sqlite3.connect(path).execute("SELECT count(*) FROM file").fetchone() == (1,)
