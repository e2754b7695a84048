"""The order of training: properties that hold for all sizes."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtrain.data.order import Order, permutation

orders = st.builds(
    lambda seed, sizes, batch: Order(seed, [b for b, n in enumerate(sizes) for _ in range(n)], batch),
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(1, 9),
)


def stream(order: Order, count: int) -> list:
    return [draw for m in range(count) for draw in order.draws(m)]


@given(orders)
@settings(max_examples=60, deadline=None)
def test_every_item_is_drawn_exactly_once_in_every_epoch(order) -> None:
    # Enough epochs for every bucket to have completed its batches of the first two.
    draws = stream(order, order.batches_before(2 + order._batch))
    numbers = [draw.number for draw in draws]
    assert len(numbers) == len(set(numbers))
    first_two = [draw for draw in draws if draw.number < 2 * order.length]
    assert Counter(draw.item for draw in first_two) == dict.fromkeys(range(order.length), 2)
    assert sorted(draw.number for draw in first_two) == list(range(2 * order.length))


@given(orders)
@settings(max_examples=60, deadline=None)
def test_a_batch_holds_one_bucket_and_is_never_partial(order) -> None:
    for m in range(order.batches_before(5)):
        draws = order.draws(m)
        assert len(draws) == order._batch
        assert len({int(order._bucket_of[draw.item]) for draw in draws}) == 1
        assert [d.number for d in draws] == sorted(d.number for d in draws)


@given(orders, st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_sequence_is_the_same_in_any_order_of_access(order, random) -> None:
    count = order.batches_before(6)
    forward = [order.draws(m) for m in range(count)]
    fresh = Order(order._seed, order._bucket_of.tolist(), order._batch)
    for m in random.sample(range(count), count):
        assert fresh.draws(m) == forward[m]


@given(orders, st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_the_batch_size_changes_no_draw(order, batch) -> None:
    """Draw number -> item is the same table for every batch size."""
    other = Order(order._seed, order._bucket_of.tolist(), batch)
    one = {d.number: d.item for d in stream(order, order.batches_before(4))}
    two = {d.number: d.item for d in stream(other, other.batches_before(4))}
    assert all(two[number] == item for number, item in one.items() if number in two)


@given(orders)
@settings(max_examples=60, deadline=None)
def test_a_batch_is_complete_when_its_last_item_is_passed(order) -> None:
    lasts = [max(d.number for d in order.draws(m)) for m in range(order.batches_before(5))]
    assert lasts == sorted(lasts)
    for m, last in enumerate(lasts):
        assert order.epoch_of(m) == pytest.approx((last + 1) / order.length)


@given(orders, st.floats(0.01, 5))
@settings(max_examples=100, deadline=None)
def test_epochs_and_micro_batches_are_one_count(order, epochs) -> None:
    count = order.micro_batches(epochs)
    passed = math.floor(epochs * order.length + 1e-6) / order.length
    assert count == 0 or order.epoch_of(count - 1) <= passed + 1e-9
    assert order.epoch_of(count) > passed


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_one_bucket_of_n_gives_floor_of_epochs_times_n_by_batch(batch) -> None:
    order = Order(0, [0] * 10, batch)
    assert [order.micro_batches(e) for e in (1, 2, 7)] == [10 // batch, 20 // batch, 70 // batch]


def test_a_bucket_smaller_than_a_batch_fills_it_over_epochs() -> None:
    order = Order(3, [0, 0, 0], 8)
    draws = order.draws(0)
    assert [draw.number // 3 for draw in draws] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert order.micro_batches(2) == 0
    assert order.micro_batches(3) == 1


def test_a_far_micro_batch_is_found_without_walking_there() -> None:
    order = Order(1, [0] * 5 + [1] * 3, 4)
    assert order.draws(10**12)[0].number // 8 == pytest.approx(10**12 / 2, rel=1e-9)


def test_the_permutation_is_philox_sorted_and_known_by_value() -> None:
    """A golden value: another order after an upgrade would make resumed runs other runs."""
    assert permutation(42, 0, 10).tolist() == GOLDEN
    assert not np.array_equal(permutation(42, 1, 10), GOLDEN)
    assert not np.array_equal(permutation(43, 0, 10), GOLDEN)


GOLDEN = [4, 5, 1, 2, 7, 8, 3, 0, 6, 9]


def test_each_item_comes_at_each_position_equally_often() -> None:
    counts = np.zeros((5, 5))
    for epoch in range(4000):
        counts[permutation(9, epoch, 5), np.arange(5)] += 1
    chi_squared = ((counts - 800) ** 2 / 800).sum()
    assert chi_squared < 39.3  # 99.9% of chi squared with 16 degrees of freedom


def test_nothing_to_order_and_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="no items"):
        Order(0, [], 1)
    with pytest.raises(IndexError):
        Order(0, [0], 1).draws(-1)
