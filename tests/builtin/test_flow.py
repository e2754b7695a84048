"""The flow sampler: its distribution against analytic quantiles, its solver against exact answers."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from pydantic import ValidationError

from vtrain.contract import NoiseLevel
from vtrain_builtin.flow import FLOW, Flow, FlowOptions

DRAWS = 40_000


def sampler(**options: object) -> Flow:
    return Flow(FlowOptions.model_validate(options), {})


def quantiles(flow: Flow, shares: tuple[float, ...]) -> list[float]:
    sigma = flow.draw(DRAWS, torch.Generator().manual_seed(0)).sigma.double()
    return [float(value) for value in torch.quantile(sigma, torch.tensor(shares, dtype=torch.float64))]


@pytest.mark.parametrize(
    ("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.0, 1.0, 3.0), (-0.5, 1.4, 1.0), (0.3, 0.7, 8.0)]
)
def test_logit_normal_levels_have_the_analytic_quantiles(mean: float, std: float, shift: float) -> None:
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    found = quantiles(sampler(mean=mean, std=std, shift=shift), shares)
    for share, value in zip(shares, found, strict=True):
        level = 1 / (1 + math.exp(-(mean + std * NormalDist().inv_cdf(share))))
        assert value == pytest.approx(shift * level / (1 + (shift - 1) * level), abs=0.01)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_uniform_levels_have_the_analytic_quantiles(shift: float) -> None:
    shares = (0.1, 0.5, 0.9)
    found = quantiles(sampler(distribution="uniform", shift=shift), shares)
    for share, value in zip(shares, found, strict=True):
        assert value == pytest.approx(shift * share / (1 + (shift - 1) * share), abs=0.01)


def test_corruption_is_the_straight_line_and_the_target_its_slope() -> None:
    clean, noise = torch.full((2, 1, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1, 1), -1.0)
    noisy, target = sampler().corrupt(clean, noise, NoiseLevel(torch.tensor([0.25, 0.5])))
    assert noisy.flatten().tolist() == [1.25, 0.5]
    assert target.flatten().tolist() == [-3.0, -3.0]


def test_bf16_clips_are_mixed_in_fp32_and_come_back_in_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn((1, 4, 2, 8, 8), generator=generator).bfloat16() for _ in range(2))
    level = NoiseLevel(torch.tensor([0.3]))
    noisy, target = sampler().corrupt(clean, noise, level)
    exact_noisy, exact_target = sampler().corrupt(clean.float(), noise.float(), level)
    assert torch.equal(noisy, exact_noisy.bfloat16())
    assert torch.equal(target, exact_target.bfloat16())


def test_the_solver_visits_the_shifted_grid() -> None:
    seen: list[float] = []

    def predict(noisy: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        assert level.timestep is None
        seen.append(float(level.sigma[0]))
        return torch.zeros_like(noisy)

    sampler(shift=1.0, sampling_shift=3.0).solve(predict, torch.zeros(1, 1, 1, 1, 1), 4)
    assert seen == pytest.approx([3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5, 0.25)])


def test_the_sampling_shift_is_the_training_shift_unless_given() -> None:
    rows = [dict(sampler(shift=3.0, **more).describe())["sampling"] for more in ({}, {"sampling_shift": 8.0})]
    assert rows == ["Euler, linear grid, shift 3", "Euler, linear grid, shift 8"]


def test_the_solver_is_first_order_on_a_known_equation() -> None:
    """dx/ds = x has the solution x(0) = x(1) / e; halving the step halves the error."""
    start = torch.ones(1, 1, 1, 1, 1, dtype=torch.float32)
    errors = [abs(float(sampler().solve(lambda x, level: x, start, steps)) - math.exp(-1)) for steps in (20, 40, 80)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_a_solver_without_a_step_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        sampler().solve(lambda x, level: x, torch.zeros(1, 1, 1, 1, 1), 0)


def test_options_without_effect_are_named() -> None:
    assert list(sampler(distribution="uniform", std=2.0, mean=1.0).warnings()) == [
        'mean and std: no effect, because distribution is "uniform"'
    ]
    assert not sampler(mean=1.0).warnings()
    assert not sampler(distribution="uniform").warnings()


def test_a_scheduler_config_of_the_model_is_said_to_be_unused() -> None:
    flow = FLOW.build(FlowOptions(), {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert dict(flow.describe())["scheduler config"] == "FlowMatchEulerDiscreteScheduler, not used by this sampler"


@pytest.mark.parametrize("wrong", [{"shift": 0.0}, {"std": -1.0}, {"distribution": "cosine"}])
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        FlowOptions.model_validate(wrong)
