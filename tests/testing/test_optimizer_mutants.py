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
from vtrain.contract.run_rules import built_groups
from vtrain.testing import OptimizerTests, SpecTests
from vtrain.testing.optimizer import Trained, grouped, saved, states_of, weights_of
from vtrain.train.optimizer_piece import OptimizerPiece
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
        lost = state.setdefault("lost", torch.zeros_like(gradient))
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


def compensated_in_bf16(self: Signs, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
    """Kahan summation as libraries have it: what rounding takes is rounded itself."""
    Signs.move(self, weight, gradient, group)
    self.state[weight]["lost"].copy_(self.state[weight]["lost"].to(weight.dtype))


def scaled(self: Signs, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
    """1 - lr x weight_decay, which in bf16 is 1."""
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    Signs.move(self, weight, gradient, {**group, "weight_decay": 0.0})


def sharing(self: Signs, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
    """Two names of one memory."""
    Signs.move(self, weight, gradient, group)
    self.state[weight]["mean again"] = self.state[weight]["mean"].view(-1)


def generating(self: Signs, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
    Signs.move(self, weight, gradient, group)
    self.state[weight]["generator"] = torch.Generator()


def listing(self: Signs, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
    Signs.move(self, weight, gradient, group)
    self.state[weight]["means"] = [self.state[weight]["mean"].clone()]


class Remembering(Signs):
    """It keeps a list in its groups."""

    def settings(self, group: ParameterGroup) -> dict[str, Any]:
        return {**super().settings(group), "rates": []}

    def move(self, weight: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        super().move(weight, gradient, group)
        group["rates"].append(group["lr"])


class Wound(Signs):
    """A sound one whose groups have what a checkpoint brings back: a tensor that counts, a flag, and a table that stays."""

    def settings(self, group: ParameterGroup) -> dict[str, Any]:
        return {**super().settings(group), "turns": torch.tensor(0), "wound": False, "signs": {"up": torch.ones(2)}}

    def move(self, weight: Tensor, gradient: Tensor, group: Any) -> None:
        if not group["wound"]:  # as torch-optimi sets its count to 0 where its flag says that it has none
            group["wound"], group["turns"] = True, torch.tensor(0)
        group["turns"] += 1
        super().move(weight, gradient * (1 if int(group["turns"]) % 3 else -1), group)


class Beside(Signs):
    """It saves more in a state_dict of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scale": 1.0}


class Apart(Signs):
    """Its state lies in an attribute."""

    def __init__(self, options: SignOptions, groups: Sequence[ParameterGroup]) -> None:
        super().__init__(options, groups)
        self.means: dict[int, dict[str, Tensor]] = {}

    def move(self, weight: Tensor, gradient: Tensor, group: Mapping[str, float]) -> None:
        mean = self.means.setdefault(id(weight), {"mean": torch.zeros_like(gradient)})["mean"].lerp_(gradient, 0.1)
        weight.add_(self.direction(mean), alpha=-group["lr"])


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


PLANTED: tuple[tuple[str, str, str, Callable[[], OptimizerSpec]], ...] = (
    (
        "something around an optimizer",
        "test_it_is_an_optimizer_of_all_parameters",
        "build gave a Lost",
        lambda: replace(SIGNS, build=Lost),
    ),
    (
        "the last group of parameters forgotten",
        "test_it_is_an_optimizer_of_all_parameters",
        "its groups hold other parameters",
        lambda: replace(SIGNS, build=lambda options, groups: Signs(options, groups[:-1])),
    ),
    (
        "weights that are scaled when it is built",
        "test_building_moves_nothing",
        "build changes block.weight",
        lambda: replace(SIGNS, build=shrinking),
    ),
    (
        "lr_factor ignored",
        "test_the_learning_rate_reaches_every_group",
        "head.weight: 0.01, not 0.001",
        lambda: made(Signs, settings=one_rate),
    ),
    (
        "a learning rate that is read when it is built",
        "test_the_schedule_scales_the_learning_rate",
        "it moves at a rate of 0",
        lambda: made(Signs, move=own_rate),
    ),
    (
        "steps uphill",
        "test_a_loss_falls",
        "its loss did not fall",
        lambda: made(Signs, direction=lambda self, mean: -mean.sign()),
    ),
    (
        "norms and biases that decay",
        "test_weight_decay_is_where_a_group_asks_for_it",
        "block.norm moves, in a group that does not decay",
        lambda: made(Signs, settings=decaying),
    ),
    (
        "an option weight_decay without effect",
        "test_weight_decay_is_where_a_group_asks_for_it",
        "block.weight does not shrink",
        lambda: made(Signs, settings=never_decaying),
    ),
    (
        "no gradient taken for one of ones",
        "test_parameters_without_a_gradient_stay",
        "it moves without a gradient",
        lambda: made(Signs, step=without_gradients),
    ),
    (
        "a division by the size of the gradient",
        "test_gradients_of_zeros_are_taken",
        "not finite",
        lambda: made(Signs, direction=lambda self, mean: mean / mean.norm()),
    ),
    (
        '"bf16" in moves, and updates that rounding loses',
        "test_small_steps_in_bf16_are_not_lost",
        "bf16 weights moved 0% of what fp32 weights did",
        lambda: made(Signs, move=rounded),
    ),
    (
        '"bf16" in moves, and what rounding takes kept in bf16',
        "test_small_steps_in_bf16_are_not_lost",
        "% of what fp32 weights did",
        lambda: made(Signs, move=compensated_in_bf16),
    ),
    (
        '"bf16" in moves, and decay that rounding loses',
        "test_small_decay_in_bf16_is_not_lost",
        "bf16 weights shrank by 0% of what fp32 weights did",
        lambda: made(Signs, move=scaled),
    ),
    (
        '"sharded" in moves, and a step that goes by the mean of the whole weight',
        "test_parts_of_a_weight_are_moved_as_the_whole_is",
        "differ from the whole by",
        lambda: made(Signs, direction=lambda self, mean: mean / mean.abs().mean().clamp(min=1e-8)),
    ),
    (
        "half of its state declared",
        "test_its_state_takes_the_bytes_that_it_says",
        "state_bytes is 4 and 8 are kept",
        lambda: replace(SIGNS, state_bytes=4.0),
    ),
    (
        "a generator in its state",
        "test_its_state_can_be_saved",
        '"generator" of a parameter, a Generator',
        lambda: made(Signs, move=generating),
    ),
    (
        "two parts of its state in one memory",
        "test_its_state_can_be_saved",
        "its state cannot be saved",
        lambda: made(Signs, move=sharing),
    ),
    (
        "a state of all parameters under a key of its own",
        "test_its_state_can_be_saved",
        "it keeps what no checkpoint brings back: optimizer.state of all",
        lambda: made(Signs, move=keeping),
    ),
    (
        "a list of tensors under a parameter",
        "test_its_state_can_be_saved",
        'it keeps what no checkpoint brings back: "means" of a parameter, a list',
        lambda: made(Signs, move=listing),
    ),
    (
        "a list in a group",
        "test_its_state_can_be_saved",
        'it keeps what no checkpoint brings back: "rates" of a group, a list that changes',
        lambda: made(Remembering),
    ),
    (
        "more in a state_dict of its own",
        "test_its_state_can_be_saved",
        'it keeps what no checkpoint brings back: "scale" of its state_dict',
        lambda: made(Beside),
    ),
    (
        "moments in an attribute",
        "test_its_state_can_be_saved",
        'brings back: "means", an attribute with tensors that are shaped like weights',
        lambda: made(Apart),
    ),
    (
        "steps that are counted in an attribute",
        "test_a_resumed_run_is_the_same_bit_for_bit",
        "a resumed run of bf16 weights differs in block.weight",
        lambda: replace(SIGNS, build=Counting),
    ),
    (
        "rounding drawn from torch's generator",
        "test_it_draws_nothing_from_the_global_generator",
        "it draws from torch's global generator",
        lambda: made(Signs, direction=lambda self, mean: mean.sign() * torch.rand(mean.shape)),
    ),
    (
        "weights for evaluation that it has not",
        "test_weights_for_evaluation_are_said_in_the_spec",
        "eval_weights is True, and SupportsEvalWeights False",
        lambda: replace(SIGNS, eval_weights=True),
    ),
    (
        "usual_lr the wrong way round",
        "test_usual_learning_rates_are_below_the_largest_sensible_one",
        "usual_lr is (0.01, 1e-05)",
        lambda: replace(SIGNS, usual_lr=(1e-2, 1e-5)),
    ),
    (
        "usual rates beyond the sensible one",
        "test_usual_learning_rates_are_below_the_largest_sensible_one",
        "usual_lr is not sensible",
        lambda: replace(SIGNS, sensible_lr=1e-3),
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the optimizer with the mistake in it)."""


class Kit(OptimizerTests):
    table: Mapping[str, object] = {"lr": 1e-2}


@pytest.mark.parametrize(("rule", "says", "spec"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_an_optimizer_that_breaks_it(
    rule: str, says: str, spec: Callable[[], OptimizerSpec], breaks: Callable[..., None]
) -> None:
    breaks(Kit(), rule, {"spec": spec()}, says)


def test_every_rule_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(OptimizerTests) == {rule for _, rule, _, _ in PLANTED}


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
        return replace(SIGNS, moves=frozenset({"bf16"}))


class TestASoundOptimizerWithStateInItsGroups(Kit):
    """So does one that keeps more than numbers there."""

    steps = 300

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> OptimizerSpec:
        return replace(made(Wound), moves=frozenset({"fp32", "sharded"}))


@pytest.mark.parametrize("spec", [ADAMW, SIGNS, made(Wound)], ids=["adamw", "signs", "wound"])
def test_the_kit_saves_what_a_checkpoint_does(spec: OptimizerSpec, tmp_path: Path) -> None:
    weights = weights_of(torch.float32)
    optimizer = spec.build(spec.options.model_validate({"lr": 1e-3}), grouped(weights))
    own = spec.options.model_fields
    piece = OptimizerPiece(optimizer, list(weights.items()), own)
    trained = Trained(weights, optimizer, built_groups(optimizer, own))
    optimizer.param_groups[0]["k"] = 3  # as schedule-free counts its steps
    trained.step(0)
    kept = piece.gather(keep=True)
    piece.write(tmp_path, kept)
    tensors, plain = saved(trained, spec)
    assert (tmp_path / "optimizer.safetensors").read_bytes() == tensors
    assert json.loads(plain) == json.loads((tmp_path / "optimizer.json").read_text(encoding="utf-8"))
    of_parameters = {key for key in kept.tensors if not key.startswith("groups[")}
    assert dict(states_of(weights, optimizer)).keys() == of_parameters | kept.values["state"].keys()
