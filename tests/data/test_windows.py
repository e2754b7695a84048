"""Which stretches of a clip are used, against counting by hand and over all lengths."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtrain.data.scanning.fitting import cut, spread, windows

LENGTHS = st.integers(1, 120)


@pytest.mark.parametrize(
    ("frames", "starts"),
    [(10, (0,)), (14, (0,)), (15, (0, 5)), (19, (0, 9)), (20, (0, 10)), (24, (0, 10)), (25, (0, 10, 15))],
)
def test_a_clip_is_cut_into_full_stretches_and_one_more_at_its_end_if_half_of_it_is_new(
    frames: int, starts: tuple[int, ...]
) -> None:
    assert cut(frames, 10) == starts


@given(length=LENGTHS, more=st.integers(0, 1000))
def test_less_than_half_a_stretch_is_unused_and_no_frame_is_in_more_than_two(length: int, more: int) -> None:
    starts = cut(length + more, length)
    uses = [0] * (length + more)
    for start in starts:
        for frame in range(start, start + length):
            uses[frame] += 1
    assert max(uses) <= 2
    assert 2 * uses.count(0) < length
    assert len(starts) == len(set(starts))


@pytest.mark.parametrize(
    ("spare", "count", "found"),
    [(0, 4, (0,)), (9, 1, (4,)), (9, 2, (0, 9)), (9, 4, (0, 3, 6, 9)), (2, 4, (0, 1, 2)), (10, 4, (0, 3, 7, 10))],
)
def test_a_set_of_windows_is_spread_evenly(spare: int, count: int, found: tuple[int, ...]) -> None:
    assert spread(spare, count) == found


@given(spare=st.integers(0, 2000), count=st.integers(1, 60))
def test_a_set_reaches_from_end_to_end_at_distances_that_differ_by_at_most_one(spare: int, count: int) -> None:
    found = spread(spare, count)
    assert len(found) == len(set(found)) == min(count, spare + 1)
    assert all(0 <= start <= spare for start in found)
    if len(found) > 1:
        assert (found[0], found[-1]) == (0, spare)
        steps = {after - before for before, after in pairwise(found)}
        assert max(steps) - min(steps) <= 1


@given(
    length=LENGTHS,
    more=st.integers(0, 400),
    window=st.sampled_from(["start", "center", "all", "random"]),
    count=st.integers(1, 9),
    longer=st.none() | st.integers(0, 200),
)
def test_every_window_lies_inside_the_clip_and_inside_one_piece_of_it(length, more, window, count, longer) -> None:
    frames, longest = length + more, None if longer is None else length + longer
    found = windows(frames, length, window, count, longest)
    assert found == windows(frames, length, window, count, longest)
    assert found
    flat = [start for starts in found for start in starts]
    assert all(0 <= start <= frames - length for start in flat)
    assert all(len(starts) == (1 if window != "random" else len(starts)) <= max(count, 1) for starts in found)
    if window == "all":
        assert len(flat) == len(set(flat))
    pieces = cut(frames, min(frames, longest or frames))
    span = min(frames, longest or frames)
    assert all(any(piece <= start <= piece + span - length for piece in pieces) for start in flat)


def test_a_clip_longer_than_a_piece_gives_the_windows_of_each_piece() -> None:
    assert windows(100, 10, "start", 1, 40) == ((0,), (40,), (60,))
    assert windows(100, 10, "center", 1, 40) == ((15,), (55,), (75,))
    assert windows(100, 10, "random", 2, 40) == ((0, 30), (40, 70), (60, 90))
    assert windows(100, 20, "all", 1, 40) == ((0,), (20,), (40,), (60,), (80,))
    assert windows(40, 10, "start", 1, 40) == ((0,),)
