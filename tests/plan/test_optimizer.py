"""What a plan says of an optimizer: its library, the weights that it moves, the schedule beside it, clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


MUON = 'use = "muon"\nlr = 1e-4\n'
BF16 = 'base = "bf16"'


@pytest.mark.parametrize(
    ("optimizer", "precision", "told"),
    [
        (
            'use = "adamw_bf16"\nlr = 1e-4\nseed = 7',
            "",
            "rounds nothing, and saves no memory, and optimizer.seed does nothing.",
        ),
        ('use = "adamw_bf16"\nlr = 1e-4', "", "it rounds nothing, and saves no memory. It is for full training"),
        ('use = "optimi-adamw"\nlr = 1e-4\nbetas = [0.9, 0.999]', BF16, "a decay of 0.999 is lost in rounding"),
        (
            'use = "adamw"\nlr = 1e-4\nweight_decay = 1e9',
            "",
            "lr x weight_decay is 100000, and a step scales weights by 1 less that",
        ),
        ('use = "optimi-sgd"\nlr = 1e-4\nmomentum = 0.999', BF16, "optimizer.momentum: of bf16 weights"),
    ],
)
def test_what_has_no_effect_or_a_wrong_one_is_a_warning(
    plan_of: PlanOf, optimizer: str, precision: str, told: str
) -> None:
    warnings = plan_of(optimizer=optimizer, precision=precision or 'mixed = "no"').warnings
    assert any(told in text for text in warnings), warnings


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ('use = "adamw_bf16"\nlr = 1e-4\nseed = 7', BF16),
        ('use = "optimi-adamw"\nlr = 1e-4\nbetas = [0.9, 0.999]', ""),
        ('use = "optimi-adamw"\nlr = 1e-4', BF16),
    ],
)
def test_what_has_one_is_none(plan_of: PlanOf, optimizer: str, precision: str) -> None:
    assert plan_of(optimizer=optimizer, precision=precision or 'mixed = "no"').warnings == ()


class Named:
    """Of a family, what says which weights its model has."""

    lora_targets = ("to_q",)
    original_names: Mapping[str, str] = {}

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"blocks.0.to_q.weight": (4, 4), "blocks.0.norm.weight": (4,), "head.weight": (4, 4)}


def test_modules_for_adamw_that_the_model_does_not_have_are_pointed_out_and_those_of_the_default_are_not(
    plan_of: PlanOf,
) -> None:
    def told(modules: str, **tables: str) -> list[str]:
        return list(checks.optimizer_warnings(plan_of(optimizer=MUON + modules, **tables).config, Named()))

    assert told('adamw_modules = ["head", "blocks", "proj_out", "hea"]') == [
        f'optimizer.adamw_modules: nothing of the model that is trained is called "{name}"'
        for name in ("proj_out", "hea")
    ]
    assert told("") == []


def test_a_warm_up_of_the_optimizers_own_that_the_run_does_not_outlast_is_pointed_out_when_its_length_is_known(
    plan_of: PlanOf,
) -> None:
    config = plan_of(optimizer='use = "schedulefree-adamw"\nlr = 1e-3\nwarmup_steps = 100').config
    (told,) = checks.optimizer_length_warnings(config, Named(), 100)
    assert told == "optimizer.warmup_steps is 100 and the run 100 steps: the learning rate never gets past its warm-up"
    assert list(checks.optimizer_length_warnings(config, Named(), 101)) == []
    assert list(checks.optimizer_warnings(config, Named())) == []


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
