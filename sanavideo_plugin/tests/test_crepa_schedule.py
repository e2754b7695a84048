"""The weight over a run, what shuts it off, and what a resumed run remembers."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtrain.contract import (
    Condition,
    LossModule,
    NoiseLevel,
    RunLength,
    StepView,
    SupportsFeedback,
    SupportsLearningRate,
    SupportsPauses,
    SupportsWeight,
    Text,
)
from vtrain_sanavideo.crepa import Crepa
from vtrain_sanavideo.crepa_loss import CrepaLoss
from vtrain_sanavideo.crepa_options import CrepaOptions, Schedule, ScheduleOptions, SimilarityGate

RUN = RunLength(steps=11, per_epoch=4.0)


def options(**values: object) -> ScheduleOptions:
    return ScheduleOptions.model_validate(values)


def weights(run: RunLength = RUN, weight: float = 0.5, **values: object) -> list[float]:
    schedule = Schedule(weight, options(**values))
    return [schedule.weight(step, run) for step in range(run.steps)]


def loss_of(**schedule: object) -> CrepaLoss:
    torch.manual_seed(0)
    return CrepaLoss(CrepaOptions.model_validate({"block": 0, "schedule": schedule}), 6, 4)


def view_of(step: int, run: RunLength = RUN, tap: Tensor | None = None) -> StepView:
    if tap is None:
        tap = torch.randn(1, 3, 2, 2, 6, generator=torch.Generator().manual_seed(1))
    features = torch.randn(1, 3, 2, 2, 4, generator=torch.Generator().manual_seed(2))
    none, level = torch.zeros(1, 1, 3, 2, 2), NoiseLevel(torch.zeros(1), torch.zeros(1))
    condition = Condition(Text.of(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool)))
    return StepView(none, none, none, none, none, level, condition, {0: tap}, step, run, features=features)


def test_constant_is_the_weight_at_every_step() -> None:
    assert weights() == [0.5] * 11


def test_the_warm_up_rises_to_the_weight_and_the_last_step_is_at_the_end() -> None:
    assert weights(decay="linear", warmup="4 steps", end=0.1)[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert weights(decay="linear", warmup="4 steps", end=0.1)[3:] == pytest.approx(
        [0.5 - 0.4 * step / 7 for step in range(8)]
    )
    assert weights(decay="linear", warmup="1 epochs") == weights(decay="linear", warmup="4 steps")


@pytest.mark.parametrize(
    ("given", "half", "quarter"),
    [
        ({"decay": "linear"}, 0.5, 0.75),
        ({"decay": "cosine"}, 0.5, 0.85355339),
        ({"decay": "polynomial"}, 0.25, 0.5625),
        ({"decay": "polynomial", "power": 0.5}, 0.70710678, 0.8660254),
    ],
)
def test_each_decay_has_its_shape(given: dict[str, object], half: float, quarter: float) -> None:
    found = weights(RunLength(steps=100, per_epoch=1.0), 1.0, length="8 steps", **given)
    assert found[0] == 1
    assert found[2] == pytest.approx(quarter)
    assert found[4] == pytest.approx(half)
    assert found[8:] == [0.0] * 92
    ended = weights(RunLength(steps=100, per_epoch=1.0), 1.0, length="8 steps", end=0.2, **given)
    assert ended[4] == pytest.approx(0.2 + 0.8 * half)
    assert ended[8:] == pytest.approx([0.2] * 92)


def test_without_a_length_the_decay_takes_the_rest_of_the_run() -> None:
    found = weights(decay="cosine")
    assert found[0] == 0.5
    assert found[5] == pytest.approx(0.25)
    assert found[10] == 0
    assert min(found[:10]) > 0


def test_from_the_cutoff_on_the_weight_is_0() -> None:
    assert weights(cutoff="7 steps") == [0.5] * 7 + [0] * 4
    assert weights(cutoff="2 epochs") == [0.5] * 8 + [0] * 3
    assert weights(cutoff="2 steps", warmup="5 steps") == pytest.approx([0.1, 0.2] + [0] * 9)


@pytest.mark.parametrize("key", ["warmup", "length", "cutoff"])
def test_a_schedule_in_seconds_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match='needs "steps" or "epochs"'):
        options(**{key: "10 min"})


def test_where_the_weight_is_0_the_loss_is_over_and_not_active() -> None:
    module = loss_of(decay="linear", length="4 steps", cutoff="9 steps", end=0.0)
    assert [module.active(step, RUN) for step in range(11)] == [True] * 4 + [False] * 7
    assert [module.over(step, RUN) for step in range(11)] == [False] * 4 + [True] * 7


def test_a_plan_draws_the_weight_that_the_loss_has() -> None:
    part = Crepa(
        CrepaOptions.model_validate({"block": 0, "schedule": {"decay": "cosine", "end": 0.1, "warmup": "2 steps"}})
    )
    assert isinstance(part, SupportsWeight)
    module = loss_of(decay="cosine", end=0.1, warmup="2 steps")
    for step in range(RUN.steps):
        assert float(module(view_of(step)).metrics["weight"]) == pytest.approx(part.weight_at(step, RUN))


def test_the_module_says_what_core_asks() -> None:
    module: LossModule = loss_of()
    assert isinstance(module, SupportsPauses)
    assert isinstance(module, SupportsFeedback)
    assert isinstance(module, SupportsLearningRate)


def test_the_value_is_weighted_by_the_step() -> None:
    module = loss_of(decay="linear", end=0.1)
    first, last = module(view_of(0)), module(view_of(10))
    assert float(first.metrics["weight"]) == 0.5
    assert float(last.metrics["weight"]) == pytest.approx(0.1)
    assert float(first.value.detach()) == pytest.approx(5 * float(last.value.detach()), rel=1e-6)
    assert torch.equal(first.metrics["alignment_loss"], last.metrics["alignment_loss"])


def test_the_running_mean_counts_steps_not_readings() -> None:
    gate = SimilarityGate(options(threshold=0.9, smoothing=0.5))
    gate.tell(1, 0.8)
    gate.tell(2, 0.4)
    assert gate.mean == pytest.approx(0.6)
    gate.tell(5, 0.0)
    assert gate.mean == pytest.approx(0.6 / 8)


def test_conclusions_are_drawn_only_when_asked_for() -> None:
    module = loss_of(threshold=0.5)
    module.observe(1, {"similarity": 0.9}, decide=False)
    assert module.active(1, RUN)
    module.observe(2, {"similarity": 0.9}, decide=True)
    assert not module.active(2, RUN)


def test_a_permanent_threshold_shuts_off_for_good() -> None:
    module = loss_of(threshold=0.5, smoothing=0.0, probe_every=1)
    module.observe(1, {"similarity": 0.49}, decide=True)
    assert module.active(1, RUN)
    assert not module.over(5, RUN)
    module.observe(2, {"similarity": 0.5}, decide=True)
    assert not any(module.active(step, RUN) for step in range(11))
    assert all(module.over(step, RUN) for step in range(11))
    module.observe(3, {}, decide=True)
    module.observe(4, {"similarity": 0.0}, decide=True)
    assert not module.active(4, RUN)


def test_a_recoverable_threshold_probes_and_comes_back() -> None:
    run = RunLength(steps=100, per_epoch=10.0)
    module = loss_of(threshold=0.5, smoothing=0.0, threshold_mode="recoverable", probe_every=4)
    module.observe(1, {"similarity": 0.6}, decide=True)
    assert [step for step in range(20) if module.active(step, run)] == [0, 4, 8, 12, 16]
    assert not any(module.over(step, run) for step in range(100))
    for step in range(2, 5):
        module.observe(step, {}, decide=True)
    assert not module.active(5, run)
    module.observe(5, {"similarity": 0.4}, decide=True)
    assert all(module.active(step, run) for step in range(100))


def test_a_probe_measures_and_pulls_at_nothing() -> None:
    run = RunLength(steps=100, per_epoch=10.0)
    module = loss_of(threshold=0.5, threshold_mode="recoverable", probe_every=4)
    before = module(view_of(4, run)).metrics
    module.observe(1, {"similarity": 0.6}, decide=True)
    tap = view_of(0).taps[0].clone().requires_grad_()
    term = module(view_of(4, run, tap))
    term.value.backward()
    assert float(term.value.detach()) == float(term.metrics["weight"]) == 0
    assert torch.equal(term.metrics["similarity"], before["similarity"])
    assert tap.grad is None
    assert all(weight.grad is not None and not weight.grad.any() for weight in module.parameters())


def saved(module: CrepaLoss, file: Path) -> dict[str, Tensor]:
    save_file(module.state_dict(), file)
    return load_file(file)


@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_a_resumed_run_remembers_the_mean_and_whether_it_is_shut(tmp_path: Path, mode: str) -> None:
    given = {"threshold": 0.5, "smoothing": 0.9, "threshold_mode": mode, "probe_every": 3}
    numbers = [0.3, 0.51, 0.62, 0.55, 0.1, 0.7, 0.49, 0.2, 0.9, 0.8]
    for cut in range(len(numbers) + 1):
        straight, resumed = loss_of(**given), loss_of(**given)
        for step, number in enumerate(numbers, 1):
            if step == cut + 1:
                resumed = loss_of(**given)
                resumed.load_state_dict(saved(straight, tmp_path / "state.safetensors"))
            for module in (straight, resumed) if step > cut else (straight,):
                module.observe(step, {"similarity": number} if number != 0.2 else {}, decide=step % 2 == 0)
        if cut < len(numbers):
            assert torch.equal(straight.get_extra_state(), resumed.get_extra_state())
            assert [straight.active(step, RUN) for step in range(11)] == [resumed.active(s, RUN) for s in range(11)]


@pytest.mark.parametrize(
    "numbers",
    [(2.0, 0.5, 3.0, 0.0), (1.0, float("nan"), 3.0, 0.0), (1.0, 7.0, 3.0, 0.0), (1.0, 0.5, -3.0, 0.0),
     (1.0, 0.5, float("inf"), 0.0), (1.0, 0.5, 2.5, 0.0), (1.0, 0.5, 3.0, 0.5), (1.0, 0.5, 3.0)],
)  # fmt: skip
def test_a_state_that_cannot_be_is_not_taken_over(numbers: tuple[float, ...]) -> None:
    module = loss_of(threshold=0.5)
    before = module.get_extra_state()
    with pytest.raises(ValueError, match="running mean of the similarity"):
        module.set_extra_state(torch.tensor(numbers, dtype=torch.float64))
    assert torch.equal(module.get_extra_state(), before)


def test_a_fresh_state_comes_back_as_fresh(tmp_path: Path) -> None:
    module, other = loss_of(threshold=0.5), loss_of(threshold=0.5)
    other.observe(7, {"similarity": 0.9}, decide=True)
    other.load_state_dict(saved(module, tmp_path / "state.safetensors"))
    assert other.active(0, RUN)
    assert other._gate.mean is None


def test_projector_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    module, other = loss_of(), loss_of()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight))
    assert not torch.equal(module(view_of(0)).value, other(view_of(0)).value)
    other.load_state_dict(saved(module, tmp_path / "state.safetensors"))
    assert torch.equal(module(view_of(0)).value, other(view_of(0)).value)


def test_a_threshold_taken_away_at_a_resume_opens_the_gate() -> None:
    module, other = loss_of(threshold=0.5), loss_of()
    module.observe(1, {"similarity": 0.9}, decide=True)
    other.load_state_dict(module.state_dict())
    assert not module.active(1, RUN)
    assert other.active(1, RUN)
