"""Averages of the weights, and what takes the place of the weights for a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vtrain.config.tables import EmaTable
from vtrain.contract import Device
from vtrain.testing.memory import MemoryPeak
from vtrain.train.ema import Average, swapped
from vtrain.train.eval_weights import EvalWeights, eval_weights


def layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


TYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("of_values", TYPES)
@pytest.mark.parametrize("of_weights", TYPES[:2])
def test_inside_the_block_the_weights_are_the_values_and_afterwards_both_have_their_own_bits(
    of_weights: torch.dtype, of_values: torch.dtype
) -> None:
    module = layers(of_weights)
    values = {name: torch.randn_like(value, dtype=of_values) for name, value in module.named_parameters()}
    before, other = bits(module), {name: value.clone() for name, value in values.items()}
    places = [value.data_ptr() for value in module.parameters()]
    with swapped(module.named_parameters(), values):
        assert same(bits(module), {name: value.to(of_weights) for name, value in other.items()})
        assert [value.data_ptr() for value in module.parameters()] == places
    assert same(bits(module), before)
    assert same(values, other)
    assert all(value.requires_grad for value in module.parameters())


class Stop(BaseException):
    """As Ctrl-C is: no Exception."""


def test_an_exception_brings_the_weights_back_and_goes_on() -> None:
    module = layers()
    before = bits(module)
    with pytest.raises(Stop), swapped(module.named_parameters(), {n: v.double() + 1 for n, v in before.items()}):
        raise Stop
    assert same(bits(module), before)


def test_values_that_fail_half_way_change_nothing() -> None:
    module = layers()
    before = bits(module)

    class Failing(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            if name == "1.bias":
                raise Stop
            return torch.zeros_like(before[name])

        def __iter__(self) -> Iterator[str]:
            return iter(before)

        def __len__(self) -> int:
            return len(before)

        def __contains__(self, name: object) -> bool:
            return name in before

    with pytest.raises(Stop), swapped(module.named_parameters(), Failing()):
        pytest.fail("the block ran")
    assert same(bits(module), before)


def test_a_value_of_another_shape_is_refused_by_name_and_changes_nothing() -> None:
    module = layers()
    before = bits(module)
    values = {"0.weight": torch.zeros(7, 5), "1.weight": torch.zeros(7, 3)}
    message = r"1\.weight is \(3, 7\), and its value \(7, 3\)"
    with pytest.raises(ValueError, match=message), swapped(module.named_parameters(), values):
        pytest.fail("the block ran")
    assert same(bits(module), before)


def test_a_parameter_without_a_value_keeps_its_weights() -> None:
    module = layers()
    before = bits(module)
    with swapped(module.named_parameters(), {"1.bias": torch.ones(3)}):
        assert same(bits(module), before | {"1.bias": torch.ones(3)})


def test_training_goes_on_as_if_nothing_had_been_swapped() -> None:
    """Also with gradients and an optimizer's state there."""

    def trained(*, swapping: bool) -> dict[str, Tensor]:
        module = layers()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        for step in range(4):
            module(torch.full((2, 5), float(step))).square().mean().backward()
            if swapping:
                with swapped(module.named_parameters(), {n: v.double() * 0 for n, v in module.named_parameters()}):
                    assert float(module(torch.ones(1, 5)).detach().abs().sum()) == 0
            optimizer.step()
            optimizer.zero_grad()
        return bits(module)

    assert same(trained(swapping=True), trained(swapping=False))


def in_memory_while(values: Mapping[str, Tensor], module: nn.Module) -> int:
    """Bytes that are there inside `swapped` and were not before."""
    with MemoryPeak() as memory:
        memory.count(module.parameters(), "weights")
        memory.count([] if isinstance(values, EvalWeights) else values.values(), "values")
        before = memory.now.total()
        with swapped(module.named_parameters(), values):
            found = memory.now.total() - before
        assert memory.now.total() == before, "after it"
    return found


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 0), (torch.float64, 1)], ids=["exchanged", "aside"])
def test_a_validation_with_the_average_takes_what_the_estimate_says(dtype: torch.dtype, copies: int) -> None:
    """Nothing where it lies beside the weights in their type; elsewhere (here: of another type) training's weights once more. The
    estimate of `MemorySettings.aside`."""
    module = layers()
    size = sum(each.nbytes for each in module.parameters())
    average = {name: each.detach().to(dtype, copy=True) for name, each in module.named_parameters()}
    assert in_memory_while(average, module) == copies * size


def test_a_validation_with_weights_for_evaluation_takes_a_second_set() -> None:
    """The estimate of `MemorySettings.both`."""

    class Halved(torch.optim.SGD):
        def eval_weight(self, weight: Tensor) -> Tensor:
            return weight.detach() / 2

    module = layers()
    size = sum(each.nbytes for each in module.parameters())
    named: list[tuple[str, Tensor]] = list(module.named_parameters())
    values = eval_weights(Halved(module.parameters(), lr=0.1), named, named)
    assert values is not None
    assert in_memory_while(values, module) == size


# -- the average ---------------------------------------------------------------------------------------------------------


def table(**values: Any) -> EmaTable:
    return EmaTable(**{"warmup": False, "decay": 0.9, **values})


def moved(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in module.parameters():
            weights.add_(torch.randn(weights.shape, generator=generator).to(weights.dtype), alpha=0.1)


def test_the_average_is_that_of_torch_bit_for_bit() -> None:
    """torch.optim.swa_utils takes the first weights as they are: its average begins there."""
    module = layers()
    reference = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(module)
    average = Average(list(module.named_parameters()), table(), Device())
    for step in range(20):
        moved(module, step)
        reference.update_parameters(module)
        average.update()
    assert same(average.weights, bits(reference.module))
    assert not same(average.weights, bits(module))


@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_the_closed_form_of_all_weights_there_were(warmup: bool) -> None:
    """In fp64: the sum of (1 - d_j) w_j over all steps j, each times the decays of the steps after it, and of the first weights."""
    module = layers()
    average = Average(list(module.named_parameters()), table(decay=0.99, warmup=warmup), Device())
    weights = [module[0].weight.detach().double()]
    for step in range(200):
        moved(module, step)
        average.update()
        weights.append(module[0].weight.detach().double())
    decays = [min(0.99, (1 + n) / (10 + n)) if warmup else 0.99 for n in range(1, 201)]
    expected = torch.zeros_like(weights[0])
    for step, value in enumerate(weights):
        own = 1.0 if step == 0 else 1 - decays[step - 1]
        expected += own * math.prod(decays[step:]) * value
    assert torch.allclose(average.weights["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("every", [2, 5, 10])
def test_an_update_after_several_steps_means_as_much_as_one_after_each(every: int, warmup: bool) -> None:
    """Of weights that do not move, whatever the interval: decay to the power of the steps, in fp32 and in the closed form."""
    module = layers()
    start, end = bits(module), torch.ones(3)
    found = {}
    for interval in (1, every):
        with torch.no_grad():
            module[1].bias.copy_(start["1.bias"])
        average = Average(list(module.named_parameters()), table(update_every=interval, warmup=warmup), Device())
        with torch.no_grad():
            module[1].bias.copy_(end)
        for _ in range(20):
            average.update()
        assert average.taken == average.steps == 20
        found[interval] = average.weights["1.bias"]
    left = math.prod(min(0.9, (1 + n) / (10 + n)) if warmup else 0.9 for n in range(1, 21))
    assert torch.allclose(found[1], found[every], rtol=1e-5)
    assert torch.allclose(found[every], end + left * (start["1.bias"] - end), rtol=1e-5)


def test_the_average_of_bf16_weights_is_fp32_and_moves() -> None:
    module = layers(torch.bfloat16)
    average = Average(list(module.named_parameters()), table(decay=0.9999), Device())
    before = {name: value.clone() for name, value in average.weights.items()}
    moved(module, 1)
    average.update()
    for name, value in average.weights.items():
        weights = dict(module.named_parameters())[name].detach().float()
        assert value.dtype is torch.float32
        assert torch.allclose(value, before[name] + 1e-4 * (weights - before[name]), rtol=1e-6)
        assert not torch.equal(value, before[name])
        assert torch.equal(value.bfloat16(), before[name].bfloat16()), "in bf16 it would have stood still"


class Card:
    """As a Device with a queue of its own: copies arrive only when they are waited for."""

    accelerated = True

    def __init__(self) -> None:
        self.copies: list[str] = []

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor

    def copy_out(self, tensors: Sequence[Tensor], into: Sequence[Tensor]) -> Callable[[], None]:
        queued = [tensor.clone() for tensor in tensors]
        for place in into:
            place.fill_(float("nan"))
        self.copies.append("asked")

        def arrive() -> None:
            for place, tensor in zip(into, queued, strict=True):
                place.copy_(tensor)

        return arrive


def test_in_main_memory_beside_a_card_it_is_the_same_average() -> None:
    module, card = layers(), Card()
    here = Average(list(module.named_parameters()), table(update_every=2), Device())
    there = Average(list(module.named_parameters()), table(update_every=2, on="cpu"), card)  # type: ignore[arg-type]
    for step in range(9):
        moved(module, step)
        here.update()
        there.update()
    there.close()
    assert same(there.weights, here.weights)
    assert card.copies == ["asked"] * 4
    assert there.finite
