"""Files behind URLs and parts of files read as any file is."""

from __future__ import annotations

import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtrain_builtin import seekable
from vtrain_builtin.seekable import FilePart, RemoteFile

DATA = random.Random(1).randbytes(5000)
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 3000)),
        st.tuples(st.just("seek"), st.integers(0, 6000)),
        st.tuples(st.just("end"), st.integers(-5000, 0)),
    ),
    max_size=30,
)


def ranges(start: int, end: int) -> bytes:
    assert 0 <= start < end <= len(DATA)
    return DATA[start:end]


@settings(max_examples=300, deadline=None)
@given(moves=MOVES, start=st.integers(0, 5000), first=st.integers(1, 700), buffer=st.integers(1, 900))
def test_any_reading_is_that_of_the_bytes(moves: list[tuple[str, int]], start: int, first: int, buffer: int) -> None:
    size = len(DATA) - start
    expected = io.BytesIO(DATA[start:])
    opened = (
        io.BufferedReader(RemoteFile(ranges, size, start, first), buffer),
        io.BufferedReader(FilePart(io.BytesIO(DATA), start, size), buffer),
    )
    for kind, number in moves:
        if kind == "read":
            wanted = expected.read(number)
            assert [file.read(number) for file in opened] == [wanted, wanted]
        else:
            place = (max(number, -size), io.SEEK_END) if kind == "end" else (number, io.SEEK_SET)
            assert [file.seek(*place) for file in opened] == [expected.seek(*place)] * 2
    assert [file.tell() for file in opened] == [expected.tell()] * 2


def test_blocks_double_while_a_file_is_read_on_and_start_small_after_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seekable, "LARGEST_BLOCK", 800)
    asked: list[tuple[int, int]] = []

    def fetch(start: int, end: int) -> bytes:
        asked.append((start, end))
        return DATA[start:end]

    file = RemoteFile(fetch, len(DATA), first=100)
    while file.tell() < 3000:
        file.read(50)
    file.seek(4000)
    file.read(10)
    assert [end - start for start, end in asked] == [100, 200, 400, 800, 800, 800, 100]
    assert asked[-1] == (4000, 4100)


def test_slow_answers_do_not_make_blocks_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seekable, "_SOON", 0.0)
    asked: list[int] = []

    def fetch(start: int, end: int) -> bytes:
        asked.append(end - start)
        return DATA[start:end]

    file = io.BufferedReader(RemoteFile(fetch, len(DATA), first=1000))
    assert file.read() == DATA
    assert asked == [1000] * 5


def test_a_failed_read_can_be_tried_again() -> None:
    broken = [False]

    def fetch(start: int, end: int) -> bytes:
        if broken[0]:
            raise OSError("dropped")
        return DATA[start:end]

    file = RemoteFile(fetch, len(DATA), first=100)
    file.read(100)
    broken[0] = True
    with pytest.raises(OSError, match="dropped"):
        file.read(100)
    broken[0] = False
    assert file.read(100) == DATA[100:200]


def test_a_closed_file_is_not_read() -> None:
    file = RemoteFile(ranges, 100)
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
    with pytest.raises(OSError, match="Invalid argument"):
        RemoteFile(ranges, 100).seek(-1)
