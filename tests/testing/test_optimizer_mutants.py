"""Every rule of the optimizer kit fails for an optimizer that breaks it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from vtrain.contract import OptimizerSpec, Options, ParameterGroup
from vtrain.testing import OptimizerTests, SpecTests
from vtrain.testing.optimizer import grouped, saved, states_of, weights_of
from vtrain.train.pieces import OptimizerPiece
from vtrain_builtin.adamw import ADAMW


class SignOptions(Options):
    lr: float = Field(gt=0, description="learning rate")
    weight_decay: float = Field(0.01, ge=0, description="decoupled decay")


class Signs(torch.optim.Optimizer):
    """A sound optimizer: each number goes against the sign of its mean gradient, with what rounding took added to the next step."""

    def __init__(self, options: SignOptions, groups: Sequence[ParameterGroup]) -> None:
        self.options = options
        super().__init__([self.settings(group) for group in groups], {})

    def settings(self, group: ParameterGroup) -> dict[str, Any]:
        decay = self.options.weight_decay if group.decay else 0.0
        return {"params": list(group.parameters), "lr": self.options.lr * group.lr_factor, "weight_decay": decay}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.move(weight, weight.grad.float(), group)

    def move(self, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
        state = self.state[weight]
        mean = state.setdefault("mean", torch.zeros_like(gradient)).lerp_(gradient, 0.1)
        change = -group["lr"] * (self.direction(mean) + group["weight_decay"] * weight)
        lost = state.setdefault("lost", torch.zeros_like(weight))
        wanted, before = change + lost, weight.clone()
        weight.add_(wanted)
        lost.copy_(wanted - (weight.float() - before))

    def direction(self, mean: Tensor) -> Tensor:
        return mean.sign()


SIGNS = OptimizerSpec(
    "signs",
    "a sound optimizer",
    SignOptions,
    Signs,
    moves=frozenset({"fp32", "bf16", "sharded"}),
    state_bytes=8.0,
    usual_lr=(1e-5, 1e-2),
    sensible_lr=0.1,
)


def made(kind: type[Signs], **members: Any) -> OptimizerSpec:
    return replace(SIGNS, build=type(f"Broken{kind.__name__}", (kind,), members))


def shrinking(options: SignOptions, groups: Sequence[ParameterGroup]) -> Signs:
    for group in groups:
        for _, weight in group.parameters:
            weight.data.mul_(0.5)
    return Signs(options, groups)


def one_rate(self: Signs, group: ParameterGroup) -> dict[str, Any]:
    return Signs.settings(self, replace(group, lr_factor=1.0))


def own_rate(self: Signs, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
    Signs.move(self, weight, gradient, {**group, "lr": self.options.lr})


def decaying(self: Signs, group: ParameterGroup) -> dict[str, Any]:
    return Signs.settings(self, replace(group, decay=True))


def never_decaying(self: Signs, group: ParameterGroup) -> dict[str, Any]:
    return Signs.settings(self, replace(group, decay=False))


@torch.no_grad()
def without_gradients(self: Signs, closure: Any = None) -> None:
    """It takes a gradient that is not there for one of ones."""
    for group in self.param_groups:
        for weight in group["params"]:
            self.move(weight, torch.ones_like(weight) if weight.grad is None else weight.grad, group)


def rounded(self: Signs, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
    """What rounding takes is lost."""
    Signs.move(self, weight, gradient, group)
    self.state[weight]["lost"].zero_()


def sharing(self: Signs, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
    """Two names of one memory."""
    Signs.move(self, weight, gradient, group)
    self.state[weight]["mean again"] = self.state[weight]["mean"].view(-1)


def generating(self: Signs, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
    Signs.move(self, weight, gradient, group)
    self.state[weight]["generator"] = torch.Generator()


def keeping(self: Signs, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
    """A state of all parameters, under a name of its own."""
    Signs.move(self, weight, gradient, group)
    self.state["all"] = {"largest": 1.0}


class Counting(Signs):
    """It warms up by itself, and counts its steps where no checkpoint looks."""

    count = 0

    def step(self, closure: Any = None) -> None:
        self.count += 1
        super().step()

    def direction(self, mean: Tensor) -> Tensor:
        return mean.sign() * min(1.0, self.count / 10)


OPTIMIZERS: Mapping[str, Callable[[], OptimizerSpec]] = {
    "test_it_is_an_optimizer_of_all_parameters": lambda: replace(SIGNS, build=lambda o, groups: Signs(o, groups[:-1])),
    "test_building_moves_nothing": lambda: replace(SIGNS, build=shrinking),
    "test_the_learning_rate_reaches_every_group": lambda: made(Signs, settings=one_rate),
    "test_the_schedule_scales_the_learning_rate": lambda: made(Signs, move=own_rate),
    "test_a_loss_falls": lambda: made(Signs, direction=lambda self, mean: -mean.sign()),
    "test_weight_decay_is_where_a_group_asks_for_it": lambda: made(Signs, settings=decaying),
    "test_parameters_without_a_gradient_stay": lambda: made(Signs, step=without_gradients),
    "test_gradients_of_zeros_are_taken": lambda: made(Signs, direction=lambda self, mean: mean / mean.norm()),
    "test_small_steps_in_bf16_are_not_lost": lambda: made(Signs, move=rounded),
    "test_parts_of_a_weight_are_moved_as_the_whole_is": lambda: made(
        Signs, direction=lambda self, mean: mean / mean.abs().mean().clamp(min=1e-8)
    ),
    "test_its_state_takes_the_bytes_that_it_says": lambda: replace(SIGNS, state_bytes=4.0),
    "test_its_state_can_be_saved": lambda: made(Signs, move=generating),
    "test_a_resumed_run_is_the_same_bit_for_bit": lambda: replace(SIGNS, build=Counting),
    "test_it_draws_nothing_from_the_global_generator": lambda: made(
        Signs, direction=lambda self, mean: mean.sign() * torch.rand(mean.shape)
    ),
    "test_usual_learning_rates_are_below_the_largest_sensible_one": lambda: replace(SIGNS, usual_lr=(1e-2, 1e-5)),
}
MORE: Mapping[str, tuple[str, Callable[[], OptimizerSpec]]] = {
    "build gives something else": ("test_it_is_an_optimizer_of_all_parameters", lambda: replace(SIGNS, build=Lost)),
    "nothing decays": (
        "test_weight_decay_is_where_a_group_asks_for_it",
        lambda: made(Signs, settings=never_decaying),
    ),
    "two names of one memory": ("test_its_state_can_be_saved", lambda: made(Signs, move=sharing)),
    "a state of all parameters": ("test_its_state_can_be_saved", lambda: made(Signs, move=keeping)),
    "usual rates beyond the sensible one": (
        "test_usual_learning_rates_are_below_the_largest_sensible_one",
        lambda: replace(SIGNS, sensible_lr=1e-3),
    ),
}


class Lost:
    """No optimizer, but something around one."""

    def __init__(self, options: SignOptions, groups: Sequence[ParameterGroup]) -> None:
        inner = Signs(options, groups)
        self.state, self.param_groups, self.step, self.zero_grad = (
            inner.state,
            inner.param_groups,
            inner.step,
            inner.zero_grad,
        )


class Kit(OptimizerTests):
    table: Mapping[str, object] = {"lr": 1e-2}


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_the_rule_fails_for_an_optimizer_that_breaks_it(rule: str, breaks: Callable[..., None]) -> None:
    breaks(Kit(), rule, {"spec": OPTIMIZERS[rule]()})


@pytest.mark.parametrize("bug", MORE)
def test_other_bugs_are_found_too(bug: str, breaks: Callable[..., None]) -> None:
    rule, spec = MORE[bug]
    breaks(Kit(), rule, {"spec": spec()})


def test_every_rule_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(OptimizerTests) == OPTIMIZERS.keys()


class TestASoundOptimizer(SpecTests, Kit):
    """What the mutants are made from passes every rule."""

    table = Kit.table

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> OptimizerSpec:
        return SIGNS


class TestASoundOptimizerOfBf16(Kit):
    """So does one that moves bf16 weights alone."""

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> OptimizerSpec:
        return replace(SIGNS, moves=frozenset({"bf16"}), state_bytes=6.0)


@pytest.mark.parametrize("spec", [ADAMW, SIGNS], ids=lambda spec: spec.name)
def test_the_kit_saves_what_a_checkpoint_does(spec: OptimizerSpec, tmp_path: Path) -> None:
    weights = weights_of(torch.float32)
    optimizer = spec.build(spec.options.model_validate({"lr": 1e-3}), grouped(weights))
    optimizer.param_groups[0]["k"] = 3  # as schedule-free counts its steps
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    piece = OptimizerPiece(optimizer, list(weights.items()), spec.options.model_fields)
    kept = piece.gather(keep=True)
    piece.write(tmp_path, kept)
    tensors, plain = saved(weights, optimizer, spec)
    assert (tmp_path / "optimizer.safetensors").read_bytes() == tensors
    assert json.loads(plain) == json.loads((tmp_path / "optimizer.json").read_text(encoding="utf-8"))
    assert dict(states_of(weights, optimizer)).keys() == kept.tensors.keys() | kept.values["state"].keys()
