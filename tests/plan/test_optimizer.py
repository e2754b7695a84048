"""What a plan says of an optimizer: its library, the weights that it moves, the schedule beside it, clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from vtrain.contract import ConfigError
from vtrain.plan import optimizer as checks
from vtrain.plan.make import make_plan
from vtrain.plan.records import Plan
from vtrain.registry import discover

PlanOf = Callable[..., Plan]


def test_a_missing_library_is_an_error_with_the_command_that_installs_it(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        plan_of(optimizer='use = "prodigy"')
    (problem,) = caught.value.problems
    assert problem.what == 'the optimizer "prodigy" needs the package "prodigyopt", which is not installed.'
    assert problem.remedy == 'Run: pip install "vtrain[optimizers]"'
    assert plan_of(optimizer='use = "muon"\nlr = 1e-4')


def test_bf16_weights_are_trained_in_full_with_what_moves_them_and_the_others_name_it(plan_of: PlanOf) -> None:
    for use in ("adamw_bf16", "optimi-adamw"):
        assert plan_of(precision='base = "bf16"', optimizer=f'use = "{use}"\nlr = 1e-4').base == "bf16"
    config = plan_of().config
    in_bf16 = replace(config, precision=config.precision.model_copy(update={"base": "bf16"}))
    with pytest.raises(ConfigError, match='"adamw_bf16", "optimi-adam", "optimi-adamw"') as caught:
        make_plan(in_bf16, 1, discover())
    assert "optimi-ranger" not in str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "told"),
    [
        (
            'use = "schedulefree-adamw"\nlr = 1e-3',
            'use = "cosine"\nwarmup = "2 steps"',
            "takes the place of a schedule",
        ),
        ('use = "schedulefree-adamw"\nlr = 1e-3', "", "its authors advise one, of about a twentieth of the run"),
        (
            'use = "schedulefree-adamw"\nlr = 1e-3\nwarmup_steps = 3',
            'warmup = "2 steps"',
            "both raise the learning rate from 0",
        ),
        ('use = "prodigy"', 'warmup = "2 steps"', "safeguard_warmup = true"),
        ('use = "prodigy"', 'use = "linear"', 'its authors use "constant" or "cosine"'),
        ('use = "prodigy"\nlr = 1e-4', "", "is far from what prodigy is usually trained with. Usual are 0.1 to 10."),
    ],
)
def test_what_of_the_schedule_does_not_go_with_an_optimizer_is_a_warning(
    plan_of: PlanOf, optimizer: str, schedule: str, told: str
) -> None:
    warnings = plan_of(optimizer=optimizer, lr_schedule=schedule).warnings
    assert any(told in text for text in warnings), warnings


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ('use = "schedulefree-adamw"\nlr = 1e-3\nwarmup_steps = 3', ""),
        ('use = "schedulefree-adamw"\nlr = 1e-3', 'warmup = "2 steps"'),
        ('use = "adamw"\nlr = 1e-3', 'use = "cosine"\nwarmup = "2 steps"'),
    ],
)
def test_what_its_authors_advise_is_none(plan_of: PlanOf, optimizer: str, schedule: str) -> None:
    assert plan_of(optimizer=optimizer, lr_schedule=schedule).warnings == ()
