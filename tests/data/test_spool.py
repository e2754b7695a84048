"""The bytes of a file that is decoded, read once."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from vtrain.data.decoding.spool import hashed
from vtrain.data.decoding.video import FileFault


def test_a_remote_file_longer_than_the_bound_is_refused() -> None:
    reason = r"^is longer than the \S+ GiB that are fetched of a remote file$"
    with pytest.raises(FileFault, match=reason), hashed(io.BytesIO(bytes(3 << 20)), most=2 << 20):
        raise AssertionError


def test_a_local_file_that_changes_while_it_is_read_is_no_lasting_fault(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(bytes(1000))
    reason = r"^changed while it was read$"
    with file.open("rb") as stream, pytest.raises(FileFault, match=reason) as caught, hashed(stream):
        file.write_bytes(bytes(1001))
    assert not caught.value.lasting
