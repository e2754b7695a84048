"""Resampling in time."""

import pytest

from vtrain.data.decoding.video import available_frames, on_screen


def constant(rate: float, count: int, digits: int = 9) -> list[tuple[float, float, int]]:
    """Frames 0, 1, ... with timestamps rounded as a container does."""
    return [(round(k / rate, digits), 1 / rate, k) for k in range(count)]


def test_81_frames_at_24_are_54_at_16() -> None:
    assert available_frames(81 / 24, 16) == 54


@pytest.mark.parametrize(("duration", "fps", "frames"), [(1.0, 16, 16), (1.01, 16, 17), (0.999, 16, 16), (0.0, 16, 0)])
def test_a_frame_is_counted_if_it_starts_before_the_end(duration: float, fps: float, frames: int) -> None:
    assert available_frames(duration, fps) == frames


@pytest.mark.parametrize("rate", [8, 15, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120])
@pytest.mark.parametrize("digits", [3, 9])
def test_the_own_rate_gives_every_frame_once_even_with_rounded_timestamps(rate: float, digits: int) -> None:
    times = [k / rate for k in range(90)]
    assert list(on_screen(constant(rate, 90, digits), times)) == list(range(90))


@pytest.mark.parametrize(("rate", "fps"), [(30, 15), (60, 20), (48, 24), (60, 15), (50, 25)])
@pytest.mark.parametrize("digits", [3, 9])
def test_a_whole_fraction_of_the_rate_takes_every_nth_frame_without_judder(rate: int, fps: int, digits: int) -> None:
    times = [k / fps for k in range(30)]
    step = rate // fps
    assert list(on_screen(constant(rate, 30 * step, digits), times)) == list(range(0, 30 * step, step))


def test_24_to_16_takes_two_of_three_frames() -> None:
    assert list(on_screen(constant(24, 12), [k / 16 for k in range(8)])) == [0, 1, 3, 4, 6, 7, 9, 10]


@pytest.mark.parametrize("rate", [24, 25, 29.97, 30, 60])
@pytest.mark.parametrize("digits", [3, 9])
def test_as_many_frames_are_found_as_were_counted(rate: float, digits: int) -> None:
    for count in range(10, 60):
        frames = constant(rate, count, digits)
        promised = available_frames(count / rate, 16)
        assert len(list(on_screen(frames, [k / 16 for k in range(promised)]))) == promised


def test_a_frame_that_stays_long_on_screen_is_shown_again() -> None:
    frames = [(0.0, 0.1, "a"), (0.1, 0.4, "b"), (0.5, 0.1, "c")]
    assert list(on_screen(frames, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])) == ["a", "b", "b", "b", "b", "c"]


def test_a_source_that_ends_early_gives_fewer_frames() -> None:
    assert list(on_screen(constant(16, 5), [k / 16 for k in range(9)])) == [0, 1, 2, 3, 4]


def test_a_source_that_begins_after_the_window_gives_none() -> None:
    assert list(on_screen([(0.5, 0.1, "late")], [0.0, 0.1])) == []
