"""Rules of an optimizer: its groups, what it moves, what it keeps and how that comes back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from vtrain.contract import Device, OptimizerSpec, Options, ParameterGroup, SupportsEvalWeights
from vtrain.contract.run_rules import Built, built_groups, kept_in_groups, lost_state, state_fits
from vtrain.testing.sampler import gap, noise, required

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES: Mapping[str, tuple[int, ...]] = {
    "block.weight": (16, 24),
    "block.norm": (24,),
    "block.bias": (
        5000,
    ),  # as long as real ones: what is kept of each may be of fewer numbers, and of as many dimensions
    "head.weight": (6, 16),
}
GROUPS: Mapping[str, tuple[bool, float]] = {
    "block.weight": (True, 1.0),
    "block.norm": (False, 1.0),
    "block.bias": (False, 1.0),
    "head.weight": (True, 0.1),
}
"""Name of a parameter -> whether it decays, and the factor of its learning rate."""


@dataclass(frozen=True)
class Trained:
    """Weights, by name, and the optimizer that moves them. built: its groups as they were built."""

    weights: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    built: Built

    def step(self, number: int, gradients: Mapping[str, Tensor] | None = None) -> None:
        """An optimizer step as training takes it. gradients: of the weights that have one; None: those of `gradients_of`."""
        for name, gradient in (gradients_of(self.weights, number) if gradients is None else gradients).items():
            self.weights[name].grad = gradient.to(self.weights[name].dtype, copy=True)  # which it may use as a buffer
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def values(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}


def weights_of(dtype: torch.dtype, values: Mapping[str, Tensor] | None = None) -> dict[str, nn.Parameter]:
    """Fresh parameters with these values, or of absolute values from 0.5 to 2."""
    drawn = values or {name: _weight(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    return {name: nn.Parameter(value.detach().clone().to(dtype)) for name, value in drawn.items()}


def _weight(shape: Sequence[int], seed: int) -> Tensor:
    drawn = noise(shape, seed)
    return (0.5 + 1.5 * drawn.tanh().abs()) * drawn.sign()


def gradients_of(weights: Mapping[str, nn.Parameter], number: int) -> dict[str, Tensor]:
    """Of step `number`: that of half the squared distance to zero, and noise."""
    return {
        name: weight.detach().float() + 0.3 * noise(weight.shape, 1000 * number + seed)
        for seed, (name, weight) in enumerate(weights.items())
    }


def grouped(weights: Mapping[str, nn.Parameter]) -> list[ParameterGroup]:
    """A group for each parameter, with the settings of GROUPS."""
    settings = {name: GROUPS.get(name, (True, 1.0)) for name in weights}
    return [
        ParameterGroup(((name, weight),), decay=settings[name][0], lr_factor=settings[name][1])
        for name, weight in weights.items()
    ]


def states_of(weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, object]]:
    """("name of the parameter::name of the part", what the optimizer keeps there), as checkpoints name it."""
    for name, weight in weights.items():
        for part, value in optimizer.state.get(weight, {}).items():
            yield f"{name}::{part}", value


def saved(trained: Trained, spec: OptimizerSpec) -> tuple[bytes, str]:
    """What a checkpoint keeps of an optimizer: its parameters' states as safetensors and JSON, and what it keeps in its groups,
    without what the configuration file gives."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, object] = {}
    for key, value in states_of(trained.weights, trained.optimizer):
        if isinstance(value, Tensor):
            tensors[key] = value.detach().contiguous()
        else:
            plain[key] = value
    counted: list[dict[str, object]] = []
    for at, group in enumerate(kept_in_groups(trained.optimizer, spec.options.model_fields, trained.built)):
        tensors |= {f"groups[{at}]::{key}": value for key, value in group.items() if isinstance(value, Tensor)}
        counted.append({key: value for key, value in group.items() if not isinstance(value, Tensor)})
    try:
        return save(tensors), json.dumps({"state": plain, "groups": counted}, allow_nan=False)
    except (RuntimeError, TypeError, ValueError) as error:
        pytest.fail(f"its state cannot be saved: {error}", pytrace=False)


def restore(trained: Trained, tensors: bytes, plain: str) -> None:
    """Put what `saved` gave into a fresh optimizer."""
    stored = json.loads(plain)
    groups = {f"groups[{at}]": group for at, group in enumerate(trained.optimizer.param_groups)}
    for group, numbers in zip(groups.values(), stored["groups"], strict=True):
        group.update(numbers)
    for key, value in {**load(tensors), **stored["state"]}.items():
        name, _, part = key.rpartition("::")
        place = groups[name] if name in groups else trained.optimizer.state[trained.weights[name]]
        place[part] = value
    odd = [name for name, weight in trained.weights.items() if not state_fits(trained.optimizer.state[weight], weight)]
    assert not odd, f"a checkpoint would be refused: nothing that is kept of {', '.join(odd)} has its shape"


class OptimizerTests:
    """An optimizer, on small tensors.

    table: the options that its table needs, as the configuration file gives them; `lr` is one. Where options decide how much it
    keeps (momentum), those with which it keeps the most. steps: that it needs to lower a loss at this rate.
    small_lr: as of AdamW, at which a step moves a weight near 1 by less than a compensation in bf16 can hold, and 2,000 of them by
    a few steps of bf16.
    state_tolerance: of the bytes of state, relative.
    """

    table: Mapping[str, object] = {}
    steps: int = 100
    small_lr: float = 5e-6
    state_tolerance: float = 0.02

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> OptimizerSpec:
        """The spec. Override it."""
        required("spec", "the OptimizerSpec under test, as the plugin registers it")

    def options_with(self, spec: OptimizerSpec, **changes: object) -> Options:
        return spec.options.model_validate({**self.table, **changes})

    def dtype(self, spec: OptimizerSpec) -> torch.dtype:
        """A type of weights that it moves, fp32 if it can."""
        return DTYPES["fp32" if "fp32" in spec.moves else "bf16"]

    def trained(
        self,
        spec: OptimizerSpec,
        options: Options | None = None,
        values: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Trained:
        """A fresh optimizer on fresh weights."""
        return self.of(spec, weights_of(dtype or self.dtype(spec), values), options)

    def of(self, spec: OptimizerSpec, weights: Mapping[str, nn.Parameter], options: Options | None = None) -> Trained:
        """A fresh optimizer on these weights."""
        optimizer = spec.build(options or self.options_with(spec), grouped(weights))
        return Trained(weights, optimizer, built_groups(optimizer, spec.options.model_fields))

    def test_it_is_an_optimizer_of_all_parameters(self, spec: OptimizerSpec) -> None:
        """build gives a torch.optim.Optimizer with each parameter in one of its groups, and no other."""
        trained = self.trained(spec)
        assert isinstance(trained.optimizer, torch.optim.Optimizer), f"build gave a {type(trained.optimizer).__name__}"
        held = sorted(id(weight) for group in trained.optimizer.param_groups for weight in group["params"])
        assert held == sorted(map(id, trained.weights.values())), "its groups hold other parameters than it was given"

    def test_building_moves_nothing(self, spec: OptimizerSpec) -> None:
        """build changes no weight: a resumed run builds it again."""
        found, fresh = self.trained(spec).values(), weights_of(self.dtype(spec))
        moved = [name for name in fresh if not torch.equal(found[name], fresh[name])]
        assert not moved, f"build changes {', '.join(moved)}"

    def test_the_learning_rate_reaches_every_group(self, spec: OptimizerSpec) -> None:
        """A group's "lr" is the option `lr` times lr_factor of the group it came from."""
        options, trained = self.options_with(spec), self.trained(spec)
        rates = {id(weight): group["lr"] for group in trained.optimizer.param_groups for weight in group["params"]}
        for name, weight in trained.weights.items():
            wanted = options.model_dump()["lr"] * GROUPS[name][1]
            assert math.isclose(float(rates[id(weight)]), wanted), f"{name}: {rates[id(weight)]}, not {wanted}"

    def test_the_schedule_scales_the_learning_rate(self, spec: OptimizerSpec) -> None:
        """A step goes by the "lr" that its groups have at that moment: at 0 nothing moves, at another rate it moves otherwise."""
        found = []
        for factor in (0.0, 0.5, 1.0):
            trained = self.trained(spec)
            for number in range(3):
                for group in trained.optimizer.param_groups:
                    group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
                trained.step(number)
            found.append(trained.values())
        still, half, full = found
        fresh = weights_of(self.dtype(spec))
        assert not [name for name in fresh if not torch.equal(still[name], fresh[name])], "it moves at a rate of 0"
        assert [name for name in fresh if not torch.equal(half[name], full[name])], "half the rate changes nothing"

    def test_a_loss_falls(self, spec: OptimizerSpec) -> None:
        """Each parameter comes closer to the least of a quadratic loss, and stays finite."""
        trained = self.trained(spec)
        before = trained.values()
        for number in range(self.steps):
            trained.step(number)
        for name, value in trained.values().items():
            assert value.isfinite().all(), f"{name} is not finite"
            assert value.double().square().sum() < before[name].double().square().sum(), (
                f"{name}: its loss did not fall"
            )

    def test_weight_decay_is_where_a_group_asks_for_it(self, spec: OptimizerSpec) -> None:
        """A weight without slope shrinks where its group decays, if there is an option `weight_decay`; elsewhere it stays."""
        fields = spec.options.model_fields
        rate = spec.usual_lr[1] if spec.usual_lr else self.options_with(spec).model_dump()["lr"]
        options = self.options_with(spec, lr=rate, **({"weight_decay": 0.1} if "weight_decay" in fields else {}))
        for resting in ("block.weight", "block.norm"):
            trained = self.trained(spec, options)
            before = trained.values()[resting].double()
            for number in range(20):
                gradients = gradients_of(trained.weights, number)
                trained.step(number, gradients | {resting: torch.zeros_like(gradients[resting])})
            after = trained.values()[resting].double()
            if not GROUPS[resting][0]:
                assert torch.equal(after, before), f"{resting} moves, in a group that does not decay"
            elif "weight_decay" in fields:
                assert after.norm() < before.norm(), f"{resting} does not shrink, in a group that decays"

    def test_parameters_without_a_gradient_stay(self, spec: OptimizerSpec) -> None:
        """A parameter whose gradient is None keeps its value, while others move; one that gets its first later moves then."""
        trained = self.trained(spec)
        start = trained.values()
        for number in range(3):
            gradients = gradients_of(trained.weights, number)
            trained.step(number, {name: value for name, value in gradients.items() if name != "block.weight"})
        between = trained.values()
        assert torch.equal(between["block.weight"], start["block.weight"]), "it moves without a gradient"
        assert not torch.equal(between["block.norm"], start["block.norm"]), "the others do not move"
        for number in range(3, 3 + self.steps):
            trained.step(number)
        assert not torch.equal(trained.values()["block.weight"], start["block.weight"])

    def test_gradients_of_zeros_are_taken(self, spec: OptimizerSpec) -> None:
        """Where no gradient has a slope, from the first step on, everything stays finite."""
        trained = self.trained(spec)
        for number in range(3):
            trained.step(number, {name: torch.zeros(weight.shape) for name, weight in trained.weights.items()})
        odd = [name for name, value in trained.values().items() if not value.isfinite().all()]
        assert not odd, f"not finite after gradients of zeros: {', '.join(odd)}"

    def test_small_steps_in_bf16_are_not_lost(self, spec: OptimizerSpec) -> None:
        """With "bf16" in moves: 2,000 steps, each less than bf16 can hold, and less than what a compensation in bf16 can, move
        weights as far as the same steps in fp32, nearly."""
        share = self.share_in_bf16(spec, 2000, self.options_with(spec, lr=self.small_lr), slope=1.0)
        assert 0.7 < share < 1.4, f"bf16 weights moved {share:.0%} of what fp32 weights did"

    def test_small_decay_in_bf16_is_not_lost(self, spec: OptimizerSpec) -> None:
        """With "bf16" in moves, and an option `weight_decay`: without a slope, 2,000 steps whose decay is less than bf16 can hold
        shrink weights as much as in fp32, nearly."""
        if "weight_decay" not in spec.options.model_fields:
            pytest.skip("it has no option `weight_decay`")
        options = self.options_with(spec, lr=20 * self.small_lr, weight_decay=0.1)
        share = self.share_in_bf16(spec, 2000, options, slope=0.0)
        assert 0.7 < share < 1.4, f"bf16 weights shrank by {share:.0%} of what fp32 weights did"

    def share_in_bf16(self, spec: OptimizerSpec, steps: int, options: Options, slope: float) -> float:
        """How far bf16 weights move towards zero, of how far fp32 ones do, by gradients of `slope` times what they were."""
        if "bf16" not in spec.moves:
            pytest.skip('this optimizer does not say that it moves bf16 weights ("bf16" in moves)')
        start = {"weight": _weight((16, 16), 0)}
        moved = {}
        for name, dtype in DTYPES.items():
            trained = self.of(spec, weights_of(dtype, start), options)
            for number in range(steps):
                trained.step(number, {"weight": slope * start["weight"]})
            change = start["weight"].to(dtype).double() - trained.values()["weight"].double()
            moved[name] = float((change * start["weight"].sign()).mean())
        return moved["bf16"] / moved["fp32"]

    def test_parts_of_a_weight_are_moved_as_the_whole_is(self, spec: OptimizerSpec) -> None:
        """With "sharded" in moves: parts of a weight, each moved in a process of its own, go where the whole one goes. One of them
        may be empty."""
        if "sharded" not in spec.moves:
            pytest.skip('this optimizer does not say that it moves parts of weights ("sharded" in moves)')
        start = weights_of(self.dtype(spec))["block.weight"].detach()
        whole = self.trained(spec, values={"w": start})
        parts = [self.trained(spec, values={"w": part}) for part in torch.split(start, [5, 11, 0])]
        for number in range(20):
            gradient = gradients_of(whole.weights, number)["w"]
            whole.step(number, {"w": gradient})
            for part, own in zip(parts, torch.split(gradient, [5, 11, 0]), strict=True):
                part.step(number, {"w": own})
        together = torch.cat([part.values()["w"] for part in parts])
        found = gap(together, whole.values()["w"])
        assert found < 1e-5, f"parts moved by themselves differ from the whole by {found:.1e}"

    def test_its_state_takes_the_bytes_that_it_says(self, spec: OptimizerSpec) -> None:
        """state_bytes is what is kept, with the options of `table`, for each parameter of a weight of usual size; the plan's
        memory goes by it."""
        for name in sorted(DTYPES.keys() & set(spec.moves)):
            trained = self.of(spec, weights_of(DTYPES[name], {"w": _weight((128, 128), 0)}))
            trained.step(0)
            kept = [value for _, value in states_of(trained.weights, trained.optimizer) if isinstance(value, Tensor)]
            found = sum(value.numel() * value.element_size() for value in kept) / trained.weights["w"].numel()
            wanted = spec.bytes_of_state(name)
            what = "state_bytes" if name not in spec.state_bytes_of else f'state_bytes_of["{name}"]'
            said = f"{what} is {wanted:g} and {found:.3g} are kept of {name} weights"
            assert abs(found - wanted) <= max(self.state_tolerance * wanted, 0.01), said

    def test_its_state_can_be_saved(self, spec: OptimizerSpec) -> None:
        """What it keeps lies under its parameters, in tensors that share no memory, in numbers and in texts, and in numbers, flags
        and tensors on the CPU of its groups: nothing is pickled, state_dict is not asked, and a run ends at what a checkpoint
        would lose."""
        trained = self.trained(spec)
        trained.step(0)
        own, stateful = spec.options.model_fields, spec.state_bytes > 0
        found = lost_state(trained.optimizer, trained.weights.values(), own, trained.built, stateful=stateful)
        lost = list(dict.fromkeys(found))
        assert not lost, f"it keeps what no checkpoint brings back: {'; '.join(lost)}"
        saved(trained, spec)

    def test_a_resumed_run_is_the_same_bit_for_bit(self, spec: OptimizerSpec) -> None:
        """Built again and given its saved state, it continues as if it had never stopped: it keeps nothing elsewhere."""
        for name in sorted(DTYPES.keys() & set(spec.moves)):
            straight = self.trained(spec, dtype=DTYPES[name])
            for number in range(12):
                if number == 6:
                    resumed = self.trained(spec, values=straight.values(), dtype=DTYPES[name])
                    restore(resumed, *saved(straight, spec))
                straight.step(number)
                if number >= 6:
                    resumed.step(number)
            ends = (straight.values(), resumed.values())
            odd = [weight for weight in ends[0] if not torch.equal(ends[0][weight], ends[1][weight])]
            assert not odd, f"a resumed run of {name} weights differs in {', '.join(odd)}"

    def test_weights_for_evaluation_are_said_in_the_spec(self, spec: OptimizerSpec) -> None:
        """eval_weights is True for an optimizer that is SupportsEvalWeights, and for no other; the plan's memory goes by it."""
        supports = isinstance(self.trained(spec).optimizer, SupportsEvalWeights)
        assert spec.eval_weights == supports, f"eval_weights is {spec.eval_weights}, and SupportsEvalWeights {supports}"

    def test_it_draws_nothing_from_the_global_generator(self, spec: OptimizerSpec) -> None:
        """Steps are the same whatever torch's generator is at, and leave it there: processes that train together seed theirs
        differently, and their weights would drift apart."""
        ends = []
        for seed in (0, 1):
            with torch.random.fork_rng(devices=[]):
                Device().seed(seed)
                before = torch.get_rng_state()
                trained = self.trained(spec)
                for number in range(5):
                    trained.step(number)
                assert torch.equal(torch.get_rng_state(), before), "it draws from torch's global generator"
            ends.append(trained.values())
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), (
            "two runs with the same gradients differ"
        )

    def test_usual_learning_rates_are_below_the_largest_sensible_one(self, spec: OptimizerSpec) -> None:
        """usual_lr is (low, high) with 0 < low < high, and high is at most sensible_lr; the options take them all."""
        low, high = spec.usual_lr or (math.ulp(0.0), math.inf)
        assert 0 < low < high, f"usual_lr is {spec.usual_lr}"
        assert spec.sensible_lr is None or (spec.usual_lr is None or high <= spec.sensible_lr), (
            "usual_lr is not sensible"
        )
        for rate in spec.usual_lr or ():
            self.options_with(spec, lr=rate)
