"""Learning rates and intervals against their formulas."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest

from vtrain.config.tables import LrScheduleTable
from vtrain.contract import Duration
from vtrain.plan.optimizer import lr_factor
from vtrain.train.saving import Interval


def factors(table: LrScheduleTable, steps: int, per_epoch: float = 10.0) -> list[float]:
    factor = lr_factor(table, steps, per_epoch)
    return [factor(step) for step in range(steps)]


def test_warm_up_rises_in_equal_steps_to_the_full_rate() -> None:
    got = factors(LrScheduleTable(use="constant", warmup=Duration(4, "steps")), 6)
    assert got == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_follows_its_formula_after_the_warm_up_and_ends_at_end() -> None:
    steps, warmup, end = 21, 5, 0.1
    got = factors(LrScheduleTable(use="cosine", warmup=Duration(warmup, "steps"), end=end), steps)
    for step in range(warmup, steps):
        progress = (step - (warmup - 1)) / (steps - warmup)
        assert got[step] == pytest.approx(end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)), abs=1e-12)
    assert got[-1] == pytest.approx(end)
    assert got[warmup - 1] == 1.0


def test_linear_falls_in_equal_steps() -> None:
    got = factors(LrScheduleTable(use="linear", end=0.0), 5)
    assert got == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_a_warm_up_in_epochs_counts_steps_per_epoch() -> None:
    assert factors(LrScheduleTable(use="constant", warmup=Duration(0.4, "epochs")), 5, per_epoch=10) == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]


def test_a_warm_up_longer_than_the_run_never_passes_one() -> None:
    got = factors(LrScheduleTable(use="cosine", warmup=Duration(100, "steps")), 10)
    assert got == [pytest.approx((step + 1) / 100) for step in range(10)]


def test_an_interval_in_steps_is_a_pure_function_of_the_step() -> None:
    interval = Interval(Duration(3, "steps"), 10, 0.0)
    assert [step for step in range(1, 10) if interval.due(step, 1e9)] == [3, 6, 9]


def test_an_interval_in_epochs_is_due_after_whole_epochs() -> None:
    interval = Interval(Duration(0.5, "epochs"), 8, 0.0)
    assert [step for step in range(1, 13) if interval.due(step, 0.0)] == [4, 8, 12]


def test_an_interval_in_seconds_is_due_once_that_time_has_passed_since_it_was_last_done() -> None:
    interval = Interval(Duration.parse("1 min"), 10, 1000.0)
    assert [interval.due(1, now) for now in (1000.0, 1059.0, 1061.0)] == [False, False, True]
    interval.done(1500.0)
    assert [interval.due(1, now) for now in (1501.0, 1559.0, 1560.0)] == [False, False, True]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_polynomial_follows_its_formula_and_ends_at_end(power: float) -> None:
    got = factors(LrScheduleTable(use="polynomial", power=power, end=0.2, warmup=Duration(3, "steps")), 11)
    assert got[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert got[2:] == pytest.approx([0.2 + 0.8 * (1 - i / 8) ** power for i in range(9)])
    assert got[-1] == 0.2


@pytest.mark.parametrize("cycles", [1, 3, 7])
@pytest.mark.parametrize("warmup", [0, 5])
def test_cosine_with_restarts_begins_anew_in_equal_parts_and_ends_at_end(cycles: int, warmup: int) -> None:
    steps, end = 211 + warmup, 0.1
    table = LrScheduleTable(
        use="cosine_with_restarts", cycles=cycles, end=end, warmup=Duration(warmup, "steps") if warmup else None
    )
    got = factors(table, steps)[max(warmup - 1, 0) :]
    length = len(got) - 1
    for step, value in enumerate(got[:-1]):
        within = Fraction(step * cycles, length) % 1
        assert value == pytest.approx(end + (1 - end) * (1 + math.cos(math.pi * within)) / 2, abs=1e-12)
    assert got[-1] == end
    assert sum(value == 1.0 for value in got) >= 1 + (cycles - 1) * (length % cycles == 0)


def test_one_cycle_is_the_cosine_and_power_1_is_linear() -> None:
    assert factors(LrScheduleTable(use="cosine_with_restarts"), 30) == factors(LrScheduleTable(use="cosine"), 30)
    assert factors(LrScheduleTable(use="polynomial"), 30) == factors(LrScheduleTable(use="linear"), 30)


@pytest.mark.parametrize("use", ["linear", "cosine", "polynomial", "cosine_with_restarts"])
def test_a_run_that_is_all_warm_up_or_of_one_step_has_a_rate_above_zero_at_its_first(use: Any) -> None:
    assert factors(LrScheduleTable(use=use, end=0.0), 1) == [1.0]
    assert factors(LrScheduleTable(use=use, warmup=Duration(4, "steps")), 4)[-1] == 1.0
