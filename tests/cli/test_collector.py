"""The collector rests while a run loads, and nothing from before it is kept for ever."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from vtrain.cli.collector import uncollected


class Ring:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_nothing_is_collected_inside_and_the_collector_works_again_afterwards() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_works_again_after_an_error_inside() -> None:
    with pytest.raises(RuntimeError), uncollected():
        raise RuntimeError
    assert gc.isenabled()


def test_garbage_from_before_is_freed_and_not_kept_with_what_stays() -> None:
    gc.disable()
    ring = weakref.ref(Ring())
    assert ring() is not None
    with uncollected():
        pass
    assert ring() is None


def test_what_is_made_inside_is_left_out_of_later_collections() -> None:
    before = gc.get_freeze_count()
    with uncollected():
        kept = [Ring() for _ in range(100)]
    assert gc.get_freeze_count() >= before + len(kept)


def test_garbage_made_afterwards_is_freed() -> None:
    with uncollected():
        pass
    ring = weakref.ref(Ring())
    gc.collect()
    assert ring() is None
