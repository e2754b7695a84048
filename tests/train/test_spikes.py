"""Loss spikes: found at batch 1 among losses that vary tenfold by their noise level, and not cried where there are none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtrain.contract import LossSpike, StepMetrics
from vtrain.train import spikes
from vtrain.train.resume import RunState, Start
from vtrain.train.spikes import LossWatch, ReadingsPiece, Skipped, readings_piece

LORA = 'use = "toy"\ntrain = "lora"'


def row(step: int, losses: list[float], sigmas: list[float | list[float]]) -> StepMetrics:
    flow = sum(losses) / len(losses)
    names = [f"clip {n}" for n in range(len(losses))]
    return StepMetrics(step, 0.0, flow, flow, 1e-4, None, sigmas, names, 0.1, 0.0, 0, {}, losses)


def curve(seed: int, steps: int, batch: int = 1, scatter: float = 0.35) -> Iterator[StepMetrics]:
    """Flow losses as they are: 0.05 at high levels and 1 at low ones, falling over the run, lognormal about that."""
    random = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        sigmas = random.uniform(0.02, 0.98, batch)
        means = (0.05 + (1 - sigmas) ** 2) * (0.5 + math.exp(-step / 100))
        losses = means * np.exp(scatter * random.standard_normal(batch))
        yield row(step, losses.tolist(), sigmas.tolist())


def found(rows: Iterator[StepMetrics], watch: LossWatch | None = None) -> list[LossSpike]:
    watch = watch or LossWatch()
    return [spike for each in rows for spike in watch.see(each)]


@pytest.mark.parametrize("batch", [1, 4])
def test_no_false_alarm_in_ten_thousand_steps_of_curves_without_spikes(batch: int) -> None:
    assert not [spike for seed in range(5) for spike in found(curve(seed, 2000, batch))]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_spike_is_found_at_any_level_with_its_step_and_clips(batch: int) -> None:
    def spiked(at: int, seed: int) -> Iterator[StepMetrics]:
        for each in curve(seed, at + 5, batch, scatter=0.1):
            times = 8.0 if each.step == at else 1.0
            yield row(each.step, [loss * times for loss in each.clip_losses], each.sigmas)

    for seed in range(20):
        (spike,) = found(spiked(200 + seed, seed))
        assert spike.step == 200 + seed
        assert spike.loss / spike.expected > spikes.TIMES
        assert f"loss spike at step {spike.step}" in spike.text
        assert "clip 0 (noise level 0." in spike.text


def test_a_loss_that_is_high_for_its_level_alone_is_none() -> None:
    """Levels near 0 have twenty times the loss of those near 1: rare as they are, they are no spike."""

    def rare() -> Iterator[StepMetrics]:
        random = np.random.default_rng(3)
        for step in range(1, 1500):
            level = 0.05 if step % 25 == 0 else float(random.uniform(0.7, 0.98))
            yield row(step, [(0.05 + (1 - level) ** 2) * math.exp(0.2 * random.standard_normal())], [level])

    assert not [spike for spike in found(rare()) if spike.step > 25 * spikes.NEAREST]


def test_a_level_that_is_new_and_stays_is_told_a_few_times_and_then_is_the_usual() -> None:
    def jumps() -> Iterator[StepMetrics]:
        for each in curve(1, 1500, scatter=0.1):
            yield row(each.step, [loss * (8 if each.step > 300 else 1) for loss in each.clip_losses], each.sigmas)

    steps = [spike.step for spike in found(jumps())]
    assert steps[0] == 301
    assert len(steps) <= 6
    assert all(b - a > spikes.QUIET for a, b in itertools.pairwise(steps))


def test_the_hint_names_the_storage_type(plan_of: Callable[..., Any]) -> None:
    start = Start(None, RunState(0, 0, {}, "", ""), ())
    watch = readings_piece(plan_of(model=LORA, precision='base = "int4"'), start).watch
    rows = [*curve(0, 200, scatter=0.05), row(201, [50.0], [[0.0, 0.5]])]
    (spike,) = found(iter(rows), watch)
    assert 'precision.base = "int4"' in spike.text
    assert 'model.lora.start) in a new run with "bf16"' in spike.text  # a resume refuses another base
    assert "(noise level 0 to 0.5)" in spike.text
    assert spike.sigmas == ((0.0, 0.5),)
    assert not readings_piece(plan_of(model=LORA), start).watch.hint


def test_losses_that_are_not_above_0_or_not_there_are_passed_over() -> None:
    assert not found(iter([row(1, [0.0], [0.5]), row(2, [math.nan], [0.5]), row(3, [math.inf], [0.5])]))
    assert not found(iter([StepMetrics(1, 0.0, 1.0, 1.0, 1e-4, None, [0.5], ["clip"], 0.1, 0.0, 0)]))


def test_it_comes_back_from_a_checkpoint_as_it_was(tmp_path: Path) -> None:
    """Spikes, and all that it says of later ones, are those of a watch that never stopped."""
    rows = [*curve(2, 250, scatter=0.1)]
    rows[220] = row(221, [30.0], [0.5])
    whole, first, second = LossWatch(), LossWatch(), LossWatch()
    wanted = found(iter(rows), whole)
    begun = found(iter(rows[:150]), first)
    piece = ReadingsPiece(first, Skipped(3))
    piece.skipped.count = 2
    piece.write(tmp_path, piece.gather(keep=True))
    other = ReadingsPiece(second, Skipped(3))
    other.load(tmp_path)
    assert begun + found(iter(rows[150:]), second) == wanted
    assert wanted
    assert (second.clips, second.deviations, second.last) == (whole.clips, whole.deviations, whole.last)
    assert other.skipped.count == 2
    ReadingsPiece(LossWatch(), Skipped()).load(tmp_path / "of before")
