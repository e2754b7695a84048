"""The order of training: properties that hold for all sizes."""

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

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
    first_two = [draw for draw in draws if draw.number < 2 * order.length(0)]
    assert Counter(draw.item for draw in first_two) == dict.fromkeys(range(order.length(0)), 2)
    assert sorted(draw.number for draw in first_two) == list(range(2 * order.length(0)))


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
        assert order.epoch_of(m) == pytest.approx((last + 1) / order.length(0))


@given(orders, st.floats(0.01, 5))
@settings(max_examples=100, deadline=None)
def test_epochs_and_micro_batches_are_one_count(order, epochs) -> None:
    count = order.micro_batches(epochs)
    passed = math.floor(epochs * order.length(0) + 1e-6) / order.length(0)
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


SHARES = [Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(7, 10), Fraction(1, 100), Fraction(99, 100)]


@dataclass
class Weighted:
    """An order over samples with repeats of datasets with shares, the first of them whole. samples: of each item."""

    seed: int
    batch: int
    sizes: list[list[int]]
    repeats: list[int]
    shares: list[Fraction]

    def __post_init__(self) -> None:
        rows = [
            (bucket, dataset, f"{dataset}/{bucket}/{number}")
            for dataset, sizes in enumerate(self.sizes)
            for bucket, size in enumerate(sizes)
            for number in range(size)
            for _ in range(1 + self.repeats[dataset])
        ]
        self.buckets, self.datasets, self.samples = (list(column) for column in zip(*rows, strict=True))

    def order(self, batch: int | None = None) -> Order:
        return Order(self.seed, self.buckets, batch or self.batch, self.datasets, self.shares)


@st.composite
def weighted(draw) -> Weighted:
    count = draw(st.integers(1, 3))
    buckets = draw(st.integers(1, 3))
    # The first dataset has something of every bucket: none is empty.
    sizes = [draw(st.lists(st.integers(int(not n), 9), min_size=buckets, max_size=buckets)) for n in range(count)]
    return Weighted(
        draw(st.integers(0, 2**63 - 1)),
        draw(st.integers(1, 7)),
        sizes,
        [draw(st.integers(0, 2)) for _ in range(count)],
        [Fraction(1), *(draw(st.sampled_from(SHARES)) for _ in range(count - 1))],
    )


@given(weighted())
@settings(max_examples=25, deadline=None)
def test_no_sample_comes_in_an_epoch_more_often_than_its_repeats_allow(made) -> None:
    order = made.order()
    epochs = 4
    drawn = {d.number: d.item for d in stream(order, order.batches_before(epochs + order._batch))}
    for epoch in range(epochs):
        numbers = range(order.draws_before(epoch), order.draws_before(epoch + 1))
        items = [drawn[number] for number in numbers if number in drawn]
        assert len(items) == len(set(items))
        counts = Counter(made.samples[item] for item in items)
        for item, name in enumerate(made.samples):
            assert counts[name] <= 1 + made.repeats[made.datasets[item]]
            if made.shares[made.datasets[item]] == 1 and len(items) == len(numbers):
                assert counts[name] == 1 + made.repeats[made.datasets[item]]


@given(weighted())
@settings(max_examples=25, deadline=None)
def test_draws_are_numbered_through_without_a_gap_and_batches_are_whole_and_of_one_bucket(made) -> None:
    order = made.order()
    count = order.batches_before(5)
    numbers = []
    for m in range(count):
        draws = order.draws(m)
        assert len(draws) == made.batch
        assert len({made.buckets[draw.item] for draw in draws}) == 1
        assert [d.number for d in draws] == sorted(d.number for d in draws)
        numbers += [draw.number for draw in draws]
    assert len(numbers) == len(set(numbers))
    waiting = order.draws_before(5) - len(numbers)
    assert waiting <= (made.batch - 1) * len(made.sizes[0])
    assert not numbers or max(numbers) < order.draws_before(5)


@given(weighted(), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_the_sequence_is_the_same_whatever_the_number_of_processes(made, processes, accumulate) -> None:
    """Each process asks an order of its own for its micro-batches, as the loop does; together they are all, in order."""
    per_step = processes * accumulate
    steps = max(1, made.order().batches_before(3) // per_step)
    alone = made.order()
    orders = [made.order() for _ in range(processes)]
    together = [
        orders[rank].draws(step * per_step + turn * processes + rank)
        for step in range(steps)
        for turn in range(accumulate)
        for rank in range(processes)
    ]
    assert together == [alone.draws(m) for m in range(steps * per_step)]


@given(weighted(), st.data())
@settings(max_examples=25, deadline=None)
def test_a_resume_in_the_middle_of_an_epoch_goes_on_exactly(made, data) -> None:
    straight = made.order()
    count = straight.batches_before(4) + 1
    at = data.draw(st.integers(0, count))
    first, second = made.order(), made.order()
    assert [first.draws(m) for m in range(at)] + [second.draws(m) for m in range(at, count)] == [
        straight.draws(m) for m in range(count)
    ]


@given(weighted(), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_the_batch_size_changes_no_draw_of_datasets_with_weights(made, batch) -> None:
    one, other = made.order(), made.order(batch)
    first = {d.number: d.item for d in stream(one, one.batches_before(4))}
    second = {d.number: d.item for d in stream(other, other.batches_before(4))}
    assert all(second[number] == item for number, item in first.items() if number in second)


@given(weighted())
@settings(max_examples=25, deadline=None)
def test_in_the_long_run_every_item_comes_as_often_as_its_share_says(made) -> None:
    order, epochs = made.order(), 60
    counts: Counter[int] = Counter()
    for epoch in range(epochs):
        counts.update(order._epoch(epoch).items.tolist())
    for item, dataset in enumerate(made.datasets):
        # One of a circle may be one round ahead of another, and a round be cut off at either end.
        assert abs(counts[item] - epochs * made.shares[dataset]) < 2
    for dataset, share in enumerate(made.shares):
        drawn = sum(counts[item] for item, of in enumerate(made.datasets) if of == dataset)
        circles = sum(size > 0 for size in made.sizes[dataset])
        assert abs(drawn - epochs * share * made.datasets.count(dataset)) < 1 + circles


def test_weights_that_are_all_alike_are_the_order_without_weights() -> None:
    made = Weighted(5, 2, [[3, 4], [2, 0]], [0, 1], [Fraction(1), Fraction(1)])
    plain = Order(5, made.buckets, 2)
    assert [made.order().draws(m) for m in range(40)] == [plain.draws(m) for m in range(40)]


def test_small_circles_do_not_all_give_their_item_in_the_same_epoch() -> None:
    """Fifty buckets of one clip, drawn every tenth epoch: some in each."""
    made = Weighted(5, 1, [[1] * 50, [1] * 50], [0, 0], [Fraction(1), Fraction(1, 10)])
    order = made.order()
    lengths = [order.length(epoch) - 50 for epoch in range(10)]
    assert sum(lengths) == 50
    assert max(lengths) < 15


def test_the_circle_is_known_by_value() -> None:
    """A golden value: another order after an upgrade would make resumed runs other runs."""
    made = Weighted(42, 1, [[2], [6]], [0, 0], [Fraction(1), Fraction(1, 2)])
    assert [made.order()._epoch(epoch).items.tolist() for epoch in range(3)] == CIRCLE


CIRCLE = [[7, 1, 2, 6, 0], [4, 5, 3, 1, 0], [0, 7, 2, 1, 6]]
